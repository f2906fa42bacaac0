"""The four-stage body of CARE (arXiv:2411.16170), with batch norms and two classifiers."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

from ..activations import ActLayer
from ..blocks import Block, BlockLayers, MlpLayer, make_drop_path, make_mlp, resolve_mlp_layer
from ..checkpoint import check_model, convert_mixers, rename, unwrap
from ..context import Context
from ..initialization import init_linear_layers
from ..layers import (
    BatchNormAct2d,
    Conv2d,
    absorb_norm,
    add_residual,
    check_image,
    drop_images,
    fuse_conv_norm,
    make_classifier,
    normalize_tokens,
    pad_to_multiple,
)
from ..linear import fuse_linear
from ..mixers import MixerNames, MixerOptions, TokenMixer
from ..mlps import ActDepthwiseMlp
from ..norms import LayerNorm, NormLayer, fold_into_linear, is_plain, resolve_norm_layer
from .base import (
    HierarchicalVisionTransformer,
    Stage,
    build_blocks,
    embed_dims,
    image_size,
    stage_sizes,
)

PATCH = 4


class Stem(nn.Module):
    """Patches of 4 x 4 pixels, projected, and a batch norm: an image to a map (B, H', W', C)."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv = Conv2d(in_chans, dim, PATCH, stride=PATCH)
        self.norm = BatchNormAct2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(check_image(x, self.conv.in_channels), PATCH)
        return normalize_tokens(self.norm, self.conv(x).permute(0, 2, 3, 1))

    def fuse(self) -> nn.Module:
        """This stem, with its batch norm multiplied into the convolution."""
        if is_plain(self.conv, Conv2d) and type(self.norm) is BatchNormAct2d:
            self.conv = fuse_conv_norm(self.conv, self.norm).train(self.training)
            self.norm = nn.Identity()
        return self


class NormDownsample(nn.Module):
    """A batch norm and a convolution of 2 x 2 pixels and stride 2, from and to a map (B, H, W, C).

    Odd sides are padded with zeros before the norm, so that the convolution can absorb it.
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm = BatchNormAct2d(in_dim)
        self.conv = Conv2d(in_dim, dim, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        x = normalize_tokens(self.norm, x).permute(0, 3, 1, 2)
        return self.conv(x).permute(0, 2, 3, 1)

    def fuse(self) -> nn.Module:
        """This layer, with its batch norm multiplied into the convolution."""
        self.norm = absorb_norm(self.norm, self.conv)
        return self


class CareBlock(Block):
    """CARE's block: c = mixer(x); c <- c + mlp(norm(c)); x <- x + gamma c.

    The mixer's input is not normalised, and what it leaves as it is, the memory, meets what it
    has mixed in the feed-forward network: the paper's second interaction.

    Args:
        dim: channels C.
        mixer: the token mixer, called `mixer(x, context)`.
        mlp_ratio: hidden width of the feed-forward network over its width.
        drop_path: rate of stochastic depth.
        layer_scale: initial value of the layer scale gamma, or None for no scale.
        norm_layer, act_layer, mlp_layer: a class, a partial of one or a name, or None for a batch
            norm, GELU and `ActDepthwiseMlp`. A batch norm of PyTorch's gets its tokens by
            `normalize_tokens`.
    """

    gamma: Tensor | None

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = 1e-6,
        norm_layer: NormLayer | None = None,
        act_layer: ActLayer | None = None,
        mlp_layer: MlpLayer | None = None,
    ) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = resolve_norm_layer(norm_layer, BatchNormAct2d)(dim)
        self.channels_second = isinstance(self.norm, nn.modules.batchnorm._BatchNorm)
        self.mlp = make_mlp(mlp_layer, ActDepthwiseMlp, dim, int(mlp_ratio * dim), act_layer)
        self.drop_path = make_drop_path(drop_path)
        # A vector, which does not decay in the authors' code.
        gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.register_parameter("gamma", gamma)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Tokens (B, H * W, C) of the map of `context` to tokens of the same shape."""
        mixed = self.mix(x, x, context)
        mixed = mixed + self.interact(mixed, context)
        mixed, keep = drop_images(self.drop_path, mixed)
        return add_residual(x, mixed, self.gamma, keep)

    def interact(self, x: Tensor, context: Context) -> Tensor:
        """mlp(norm(x))."""
        normed = normalize_tokens(self.norm, x) if self.channels_second else self.norm(x)
        return self.feed_forward(normed, context)

    def fuse(self) -> nn.Module:
        """This block, with its batch norm multiplied into the feed-forward network."""
        fc1 = getattr(self.mlp, "fc1", self.mlp)
        self.norm = fold_into_linear(absorb_norm(self.norm, fc1), fc1)
        fuse_linear(self)
        return self


class CareLastBlock(CareBlock):
    """The last block of the network: mlp(norm(mixer(x))), without the network's second layer.

    It has neither residual sum nor layer scale, and gives `out_features` channels, as many as the
    hidden layer has; a network that is not CARE's own keeps its second layer, which gives them.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        mlp_layer: MlpLayer | None = None,
        **options: Any,
    ) -> None:
        hidden = int(mlp_ratio * dim)
        if mlp_layer is not None:
            mlp_layer = partial(resolve_mlp_layer(mlp_layer), out_features=hidden)
        super().__init__(
            dim, mixer, mlp_ratio=mlp_ratio, layer_scale=None, mlp_layer=mlp_layer, **options
        )
        self.out_features = hidden
        if mlp_layer is None:
            self.mlp.fc2 = nn.Identity()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Tokens (B, H * W, C) of the map of `context` to tokens (B, H * W, out_features)."""
        return self.drop_path(self.interact(self.mix(x, x, context), context))


class CareHead(nn.Module):
    """Pooling, GELU, and two classifiers behind layer norms, from a map (B, H, W, C).

    The second classifier is for distillation (arXiv:2012.12877); logits are the mean of both.

    Args:
        dim: channels C.
        num_classes: classes; 0 for no classifiers.
        pool_type: timm's pooling name; '' for no pooling.
        drop_rate: dropout before the classifiers.
    """

    def __init__(self, dim: int, num_classes: int, pool_type: str, drop_rate: float) -> None:
        super().__init__()
        self.num_features = dim
        self.distilled_training = False
        self.act = nn.GELU()
        self.norm, self.norm_dist = LayerNorm(dim), LayerNorm(dim)
        self.drop, self.drop_dist = nn.Dropout(drop_rate), nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type, self.norm.weight)

    def reset(self, num_classes: int, pool_type: str | None, like: Tensor) -> None:
        """Replace the classifiers, and the pooling if `pool_type` is given.

        Args:
            num_classes: classes; 0 for no classifiers.
            pool_type: see the class, or None to leave the pooling.
            like: a tensor on the device and in the dtype of the new classifiers.
        """
        if pool_type is not None:
            self.global_pool = SelectAdaptivePool2d(
                pool_type=pool_type, flatten=bool(pool_type), input_fmt="NHWC"
            )
        self.fc = make_classifier(self.num_features, num_classes, like)
        self.fc_dist = make_classifier(self.num_features, num_classes, like)
        self.train(self.training)  # new modules start in training mode

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        x = self.act(self.global_pool(x))
        y, z = self.drop(self.norm(x)), self.drop_dist(self.norm_dist(x))
        if not pre_logits:
            y, z = self.fc(y), self.fc_dist(z)
            if self.distilled_training and self.training:
                return y, z
        return (y + z) / 2


class Care(HierarchicalVisionTransformer):
    """Patches, four stages at strides 4, 8, 16 and 32 with batch norms, and two classifiers.

    Every size runs: images and maps that a patch does not divide are padded with zeros at the
    bottom and right.

    Args:
        img_size: (H, W) or side of the images that the mixers' tables are made for.
        in_chans: channels of the images.
        num_classes: classes; 0 for no classifiers.
        global_pool: timm's pooling name; '' for no pooling.
        embed_dim: width of each stage; a number is the first stage's, and each stage doubles it.
        depths, num_heads, mlp_ratios: blocks, heads, and hidden width of the feed-forward network
            over its width, of each stage.
        mixer: name of the token mixer (`linsight.backbones.mixers`): one, one per stage, or
            within a stage one per block.
        mixer_options: keyword arguments by mixer; a tuple or list has one entry per stage.
        block: the block (`linsight.backbones.blocks`), a class, a partial of one or a name: one,
            one per stage, or within a stage one per depth. None for `CareBlock`, and
            `CareLastBlock` at the end. The features are as wide as the last block's output.
        norm_layer, act_layer, mlp_layer: the layers of the blocks: a class, a partial of one or a
            name, or None for the authors' own.
        layer_scale: initial layer scale; None for no layer scales.
        drop_rate: dropout before the classifiers.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.

    Raises:
        ValueError: for an unknown mixer, block or layer, or a mixer that cannot stand here.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        embed_dim: int | Sequence[int] = 32,
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        mixer: MixerNames,
        mixer_options: MixerOptions | None = None,
        block: BlockLayers | None = None,
        norm_layer: NormLayer | None = None,
        act_layer: ActLayer | None = None,
        mlp_layer: MlpLayer | None = None,
        layer_scale: float | None = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        dims = embed_dims(embed_dim, len(depths))
        if block is None:
            classes = [[CareBlock] * depth for depth in depths]
            classes[-1][-1:] = [CareLastBlock] * bool(depths[-1])
            block = classes
        layers = {
            "layer_scale": layer_scale,
            "norm_layer": norm_layer,
            "act_layer": act_layer,
            "mlp_layer": mlp_layer,
        }
        stages = build_blocks(
            dims,
            stage_sizes(image_size(img_size), len(dims)),
            depths=depths,
            num_heads=num_heads,
            mixer=mixer,
            mixer_options=mixer_options,
            block=block,
            drop_path_rate=drop_path_rate,
            options=lambda i: layers | {"mlp_ratio": mlp_ratios[i]},
        )
        features = dims[-1]
        if stages[-1]:
            features = getattr(stages[-1][-1], "out_features", features)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = features
        self.stem = Stem(in_chans, dims[0])
        self.set_stages(
            [
                Stage(NormDownsample(dims[i - 1], dims[i]) if i else nn.Identity(), blocks)
                for i, blocks in enumerate(stages)
            ],
            (*dims[:-1], features),
        )
        self.norm = nn.Identity()
        self.head = CareHead(features, num_classes, global_pool, drop_rate)
        init_linear_layers(self, convolutions=True, skip=TokenMixer)

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """The linear layers of both classifiers, the second one for distillation."""
        return self.head.fc, self.head.fc_dist

    def set_distilled_training(self, enable: bool = True) -> None:
        """Give both classifiers' logits as a pair in training, as timm's distilled models do."""
        self.head.distilled_training = enable


AUTHORS_NAMES = {
    ".token_mixer.": ".mixer.token_mixer.",
    ".inter_layer.inter1_": ".mixer.inter_layer.inter1_",
    ".inter_layer.inter2_norm.": ".norm.",
    ".inter_layer.inter2_conv.": ".mlp.depthwise.",
    ".inter_layer.inter2_": ".mlp.",
    ".downsample.0.": ".downsample.norm.",
    ".downsample.1.": ".downsample.conv.",
    "dist_head.norm.": "head.norm_dist.",
    "dist_head.fc.": "head.fc_dist.",
    "stem.0.": "stem.conv.",
    "stem.1.": "stem.norm.",
}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Care) -> dict[str, Tensor]:
    """A checkpoint under this library's names.

    It may be one of CARE's authors or of this library.

    Raises:
        CheckpointError: if it is the checkpoint of another model.
    """
    state_dict = dict(unwrap(state_dict))
    if "stem.0.weight" in state_dict:
        state_dict = {rename(name, AUTHORS_NAMES): value for name, value in state_dict.items()}
        # The authors' 1 x 1 convolutions are linear layers here.
        state_dict = {
            name: value.flatten(1) if re.search(r"\.mlp\.fc\d\.weight$", name) else value
            for name, value in state_dict.items()
        }
    state_dict = convert_mixers(state_dict, model)
    check_model(state_dict, model)
    return state_dict
