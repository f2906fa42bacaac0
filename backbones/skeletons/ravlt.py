"""RAVLT's four-stage body with a convolutional stem (arXiv:2411.07635), which others share."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d, to_ntuple
from torch import Tensor, nn

from ..activations import ActLayer, resolve_act_layer
from ..blocks import BlockLayers, MlpLayer
from ..checkpoint import check_model, convert_mixers, rename, unwrap
from ..initialization import init_linear_layers
from ..layers import ConvNormAct, Downsample, batch_norm_affine, check_image, make_classifier
from ..linear import fuse_linear
from ..mixers import MixerNames, MixerOptions, TokenMixer
from ..norms import NormLayer, is_plain
from .base import (
    HierarchicalVisionTransformer,
    Stage,
    build_blocks,
    embed_dims,
    stage_sizes,
)

REDUCTION = 32


class Stem(nn.Sequential):
    """3 x 3 convolutions with batch norm: images (B, in_chans, H, W) to a map (B, H', W', C).

    Args:
        channels: the images' channels, then the channels after each convolution.
        strides: the strides of the convolutions.
        act_layer: a callable that makes an activation.
        last_act: whether the last convolution has an activation, too.
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], act_layer: Any, last_act: bool
    ) -> None:
        last = len(strides) - 1
        super().__init__(
            *(
                ConvNormAct(
                    channels[i],
                    channels[i + 1],
                    3,
                    stride=stride,
                    padding=1,
                    act_layer=act_layer if i < last or last_act else None,
                )
                for i, stride in enumerate(strides)
            )
        )
        self.in_chans = channels[0]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(check_image(x, self.in_chans, REDUCTION)).permute(0, 2, 3, 1)


class RAVLTHead(nn.Module):
    """Projection, batch norm, SiLU, pooling and classifier, from a map (B, H, W, C).

    Args:
        dim: channels C.
        hidden_size: channels of the projection.
        num_classes: classes; 0 for no classifier.
        pool_type: timm's pooling name; '' for no pooling.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self, dim: int, hidden_size: int, num_classes: int, pool_type: str, drop_rate: float
    ) -> None:
        super().__init__()
        self.num_features = hidden_size
        self.projection = nn.Linear(dim, hidden_size)
        self.norm = nn.BatchNorm2d(hidden_size)
        self.act = nn.SiLU()
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type, self.projection.weight)

    def reset(self, num_classes: int, pool_type: str | None, like: Tensor) -> None:
        """Replace the classifier, and the pooling if `pool_type` is given.

        Args:
            num_classes: classes; 0 for no classifier.
            pool_type: see the class, or None to leave the pooling.
            like: a tensor on the device and in the dtype of the new classifier.
        """
        if pool_type is not None:
            self.global_pool = SelectAdaptivePool2d(
                pool_type=pool_type, flatten=bool(pool_type), input_fmt="NHWC"
            )
        self.fc = make_classifier(self.num_features, num_classes, like)
        self.train(self.training)  # new modules start in training mode

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.norm(self.projection(x).permute(0, 3, 1, 2))
        x = self.drop(self.global_pool(self.act(x).permute(0, 2, 3, 1)))
        return x if pre_logits else self.fc(x)

    def fuse(self) -> nn.Module:
        """This head, with its batch norm multiplied into the projection."""
        if is_plain(self.projection) and type(self.norm) is nn.BatchNorm2d:
            with torch.no_grad():
                scale, shift = batch_norm_affine(self.norm)
                self.projection.weight.mul_(scale[:, None])
                self.projection.bias.mul_(scale).add_(shift)
            self.norm = nn.Identity()
        fuse_linear(self)
        return self


class RAVLT(HierarchicalVisionTransformer):
    """Stem, four stages at strides 4, 8, 16 and 32, and a projecting head.

    Args:
        img_size: accepted as timm's models do and checked; every size from 32 px runs.
        in_chans: channels of the images.
        num_classes: classes; 0 for no classifier.
        global_pool: timm's pooling name; '' for no pooling.
        embed_dim: width of each stage; a number is the first stage's, and each stage doubles it.
        depths, num_heads: blocks and heads of each stage.
        mixer: name of the token mixer (`linsight.backbones.mixers`): one, one per stage, or
            within a stage one per block.
        mixer_options: keyword arguments by mixer; a tuple or list has one entry per stage.
        block: the block (`linsight.backbones.blocks`), a class, a partial of one or a name: one,
            one per stage, or within a stage one per depth.
        norm_layer, act_layer, mlp_layer: the layers of the blocks and, for `act_layer`, of the
            stem: a class, a partial of one or a name, or None for the authors' own.
        mlp_ratio: hidden width of the feed-forward network over its width.
        layer_scale: initial layer scale of the residual branches, one or one per stage; None for
            no layer scales.
        head_hidden_size: channels of the head's projection.
        init_std: standard deviation of the truncated normal distribution from which the weights
            of linear layers and convolutions are drawn. With None linear layers keep PyTorch's own
            initialisation, and convolutions and the classifier have 0.02.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.

    Raises:
        ValueError: for an unknown mixer, block or layer, or an `img_size` below 32.
    """

    least_side = REDUCTION

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        embed_dim: int | Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        mixer: MixerNames,
        mixer_options: MixerOptions | None = None,
        block: BlockLayers = "position",
        norm_layer: NormLayer | None = None,
        act_layer: ActLayer | None = None,
        mlp_layer: MlpLayer | None = None,
        mlp_ratio: float = 3.5,
        layer_scale: float | Sequence[float] | None = 1.0,
        head_hidden_size: int = 1024,
        init_std: float | None = 0.02,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        size = self.check_image_size(img_size)
        dims = embed_dims(embed_dim, len(depths))
        half = dims[0] // 2
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = dims[-1]
        self.head_hidden_size = head_hidden_size
        self.stem = Stem(
            (in_chans, half, half, half, dims[0]),
            (2, 1, 1, 2),
            resolve_act_layer(act_layer, nn.GELU),
            last_act=False,
        )
        scales = to_ntuple(len(dims))(layer_scale)
        layers = {
            "mlp_ratio": mlp_ratio,
            "norm_layer": norm_layer,
            "act_layer": act_layer,
            "mlp_layer": mlp_layer,
        }
        stages = build_blocks(
            dims,
            stage_sizes(size, len(dims)),
            depths=depths,
            num_heads=num_heads,
            mixer=mixer,
            mixer_options=mixer_options,
            block=block,
            drop_path_rate=drop_path_rate,
            options=lambda i: layers | {"layer_scale": scales[i]},
            init_stds=(init_std,) * len(dims),
        )
        self.set_stages(
            [
                Stage(Downsample(dims[i - 1], dims[i]) if i else nn.Identity(), blocks)
                for i, blocks in enumerate(stages)
            ],
            dims,
        )
        self.norm = nn.Identity()
        self.head = RAVLTHead(dims[-1], head_hidden_size, num_classes, global_pool, drop_rate)
        # One pass, in the order of the modules: a seed gives the weights that it always gave.
        skip = TokenMixer if init_std is not None else (TokenMixer, nn.Linear)
        init_linear_layers(self, init_std or 0.02, convolutions=True, skip=skip)
        if init_std is None:
            # The authors' classifier is a convolution.
            init_linear_layers(self.head.fc)


AUTHORS_NAMES = {
    "layers.": "stages.",
    ".pos.": ".position.",
    ".cpe1.": ".position.",
    ".cpe2.": ".position2.",
    ".norm1.norm.": ".norm1.",
    ".norm2.norm.": ".norm2.",
    ".gamma_1": ".gamma1",
    ".gamma_2": ".gamma2",
    ".attn.": ".mixer.",
    ".ffn.dwconv.": ".mlp.depthwise.",
    ".ffn.": ".mlp.",
    ".downsample.reduction.": ".downsample.conv.",
}
AUTHORS_HEAD = {"proj.": "head.projection.", "norm.": "head.norm.", "head.": "head.fc."}


def checkpoint_filter_fn(
    state_dict: dict[str, Any], model: HierarchicalVisionTransformer
) -> dict[str, Tensor]:
    """A checkpoint under this library's names and in its shapes.

    It may be one of RAVLT's, MAViT's or NaLaFormer's authors, or of this library.

    Raises:
        CheckpointError: if it is the checkpoint of another model.
    """
    state_dict = dict(unwrap(state_dict))
    if "patch_embed.proj.0.weight" in state_dict:
        state_dict = {
            _our_name(name): value
            for name, value in state_dict.items()
            if not name.endswith(".RoPE.angle")
        }
    state_dict = convert_mixers(state_dict, model)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    state_dict = {
        # The authors' 1 x 1 convolutions are linear layers here, and scales are on the last axis.
        name: value.reshape(shapes[name])
        if name in shapes and value.numel() == shapes[name].numel()
        else value
        for name, value in state_dict.items()
    }
    check_model(state_dict, model)
    return state_dict


def _our_name(name: str) -> str:
    for theirs, ours in AUTHORS_HEAD.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    # The authors' stem is one sequence of convolutions, batch norms and activations in turn.
    name = re.sub(
        r"^patch_embed\.proj\.(\d+)\.",
        lambda m: f"stem.{int(m[1]) // 3}.{('conv', 'norm')[int(m[1]) % 3]}.",
        name,
    )
    name = rename(name, AUTHORS_NAMES)
    # The authors end a stage with the downsampling that here begins the next.
    return re.sub(
        r"^stages\.(\d+)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample", name
    )
