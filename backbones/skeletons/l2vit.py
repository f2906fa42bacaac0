"""L2ViT's four-stage body (arXiv:2501.16182): blocks of windows and of linear attention in turn."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.layers import Mlp
from torch import Tensor, nn

from ..activations import ActLayer, kernel_activation, resolve_act_layer
from ..blocks import Alternate, BlockLayers, MlpLayer, PositionBlock, make_drop_path
from ..checkpoint import check_model, convert_mixers, rename, unwrap
from ..context import Context
from ..initialization import init_linear_layers
from ..layers import (
    BatchNormAct2d,
    Conv2d,
    ConvNormAct,
    DepthwiseConv2d,
    ResidualDepthwise,
    add_and_norm,
    add_residual,
    check_image,
    drop_images,
    pad_to_multiple,
)
from ..mixers import MixerNames, MixerOptions, TokenMixer
from ..norms import LayerNorm, NormLayer, resolve_norm_layer
from .base import (
    Head,
    HierarchicalVisionTransformer,
    Stage,
    build_blocks,
    embed_dims,
    image_size,
    stage_sizes,
)

EPSILON = 1e-5
REDUCTION = 4


class Stem(nn.Module):
    """Two convolutions of stride 2, and a norm: an image (B, C, H, W) to a map (B, H', W', dim).

    Sides that 4 does not divide are padded with zeros at the bottom and right.

    Args:
        in_chans: channels of the images.
        dim: channels of the result.
        act_layer: a callable that makes the activation between the convolutions.
        norm_layer: a callable that makes the norm of `dim` channels.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        act_layer: Callable[..., nn.Module],
        norm_layer: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.conv1 = ConvNormAct(in_chans, dim // 2, 3, stride=2, padding=1, act_layer=act_layer)
        self.conv2 = ConvNormAct(dim // 2, dim, 3, stride=2, padding=1)
        self.norm = norm_layer(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(check_image(x, self.in_chans), REDUCTION)
        return self.norm(self.conv2(self.conv1(x)).permute(0, 2, 3, 1))


class NormDownsample(nn.Module):
    """A norm, and a convolution of 2 x 2 tokens and stride 2, from and to a map (B, H, W, C).

    Odd sides are padded with zeros between them, at the bottom and right.

    Args:
        in_dim, dim: channels before and after.
        norm_layer: a callable that makes the norm of `in_dim` channels.
    """

    def __init__(self, in_dim: int, dim: int, norm_layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.norm = norm_layer(in_dim)
        self.proj = Conv2d(in_dim, dim, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(self.norm(x).permute(0, 3, 1, 2), 2)
        return self.proj(x).permute(0, 2, 3, 1)


class Concentration(nn.Module):
    """Local concentration: conv2(bn(act(conv1(x)))), both convolutions depthwise and 7 x 7.

    Args:
        dim: channels C of the map (B, H, W, C).
        act_layer: a callable that makes the activation.
    """

    def __init__(self, dim: int, act_layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        act = act_layer()
        activation = kernel_activation(act)
        self.conv1 = DepthwiseConv2d(dim, 7, activation=activation)
        self.act = act if activation is None else None
        self.bn = BatchNormAct2d(dim)
        self.conv2 = DepthwiseConv2d(dim, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x.permute(0, 3, 1, 2))
        x = self.bn(x if self.act is None else self.act(x))
        return self.conv2(x).permute(0, 2, 3, 1)


class _Block(PositionBlock):
    """What both blocks share: `PositionBlock` with a plain MLP, and without layer scales."""

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        eps: float = EPSILON,
        layer_scale: float | None = None,
        mlp_layer: MlpLayer | None = None,
        **options: Any,
    ) -> None:
        options |= {"mlp_ratio": mlp_ratio, "eps": eps, "layer_scale": layer_scale}
        super().__init__(dim, mixer, mlp_layer=Mlp if mlp_layer is None else mlp_layer, **options)


class LocalBlock(_Block):
    """L2ViT's block of local windows, with conditional positions before each branch.

    x <- x + depthwise1(x); x <- x + mixer(norm1(x)); x <- x + depthwise2(x);
    x <- x + mlp(norm2(x)).

    Args:
        all: as in `linsight.backbones.blocks.PositionBlock`; the feed-forward network is timm's
            `Mlp` by default.
    """

    def __init__(self, dim: int, mixer: nn.Module, **options: Any) -> None:
        super().__init__(dim, mixer, **options)
        self.position2 = ResidualDepthwise(dim, 3)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Tokens (B, H * W, C) of the map of `context` to tokens of the same shape."""
        x = self.position(context.as_map(x, "a block of L2ViT")).flatten(1, 2)
        branch = self.drop_path1(self.mix(self.norm1(x), x, context))
        x, branch = (tokens.unflatten(1, context.size) for tokens in (x, branch))
        x = self.position2(x, branch, self.gamma1).flatten(1, 2)
        branch, keep = drop_images(self.drop_path2, self.feed_forward(self.norm2(x), context))
        return add_residual(x, branch, self.gamma2, keep)


class GlobalBlock(_Block):
    """L2ViT's block of linear attention, whose result is concentrated locally.

    x <- x + depthwise(x); x <- x + mixer(norm1(x)); x <- x + concentration(norm3(x));
    x <- x + mlp(norm2(x)).

    Args:
        all: as in `LocalBlock`; the activation is the concentration's, too.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        drop_path: float = 0.0,
        eps: float = EPSILON,
        norm_layer: NormLayer | None = None,
        act_layer: ActLayer | None = None,
        **options: Any,
    ) -> None:
        options |= {"drop_path": drop_path, "eps": eps}
        super().__init__(dim, mixer, norm_layer=norm_layer, act_layer=act_layer, **options)
        self.norm3 = resolve_norm_layer(norm_layer, partial(LayerNorm, eps=eps))(dim)
        self.concentration = Concentration(dim, resolve_act_layer(act_layer, nn.GELU))
        self.drop_path3 = make_drop_path(drop_path)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Tokens (B, H * W, C) of the map of `context` to tokens of the same shape."""
        x = self.position(context.as_map(x, "a block of L2ViT")).flatten(1, 2)
        branch, keep = drop_images(self.drop_path1, self.mix(self.norm1(x), x, context))
        x, y = add_and_norm(self.norm3, x, branch, self.gamma1, keep)
        local = self.concentration(y.unflatten(1, context.size)).flatten(1, 2)
        local, keep = drop_images(self.drop_path3, local)
        x, y = add_and_norm(self.norm2, x, local, keep=keep)
        branch, keep = drop_images(self.drop_path2, self.feed_forward(y, context))
        return add_residual(x, branch, self.gamma2, keep)


class L2ViT(HierarchicalVisionTransformer):
    """Stem, four stages at strides 4, 8, 16 and 32, norm, and a pooling head.

    Every size runs: maps that a convolution or a window does not divide are padded with zeros at
    the bottom and right.

    Args:
        img_size: (H, W) or side of the images that the mixers' tables are made for.
        in_chans: channels of the images.
        num_classes: classes; 0 for no classifier.
        global_pool: timm's pooling name; '' for no pooling.
        embed_dim: width of each stage; a number is the first stage's, and each stage doubles it.
        depths, num_heads: blocks and heads of each stage.
        mixer: name of the token mixer (`linsight.backbones.mixers`): one, one per stage, within a
            stage one per block, or an `Alternate` of those of even and of odd blocks.
        mixer_options: keyword arguments by mixer; a tuple or list has one entry per stage.
        block: the block (`linsight.backbones.blocks`), a class, a partial of one or a name, as
            `mixer`. None stands for `LocalBlock` and `GlobalBlock` in turn.
        norm_layer, act_layer, mlp_layer: a class, a partial of one or a name, or None for the
            authors' own. The activation is the stem's, too.
        mlp_ratio: hidden width of the feed-forward network over its width.
        drop_rate: dropout before the classifier.
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
        embed_dim: int | Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        mixer: MixerNames,
        mixer_options: MixerOptions | None = None,
        block: BlockLayers | None = None,
        norm_layer: NormLayer | None = None,
        act_layer: ActLayer | None = None,
        mlp_layer: MlpLayer | None = None,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        dims = embed_dims(embed_dim, len(depths))
        make_norm = resolve_norm_layer(norm_layer, partial(LayerNorm, eps=EPSILON))
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.stem = Stem(in_chans, dims[0], resolve_act_layer(act_layer, nn.ReLU), make_norm)
        layers = {
            "mlp_ratio": mlp_ratio,
            "norm_layer": make_norm,
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
            block=Alternate((LocalBlock, GlobalBlock)) if block is None else block,
            drop_path_rate=drop_path_rate,
            options=lambda _: layers,
        )
        self.set_stages(
            [
                Stage(
                    NormDownsample(dims[i - 1], dims[i], make_norm) if i else nn.Identity(), blocks
                )
                for i, blocks in enumerate(stages)
            ],
            dims,
        )
        self.norm = make_norm(dims[-1])
        self.head = Head(dims[-1], num_classes, global_pool, drop_rate, class_token=False)
        init_linear_layers(self, convolutions=True, skip=TokenMixer)


AUTHORS_NAMES = {
    "downsample_layers.0.proj.proj.0.": "stem.conv1.conv.",
    "downsample_layers.0.proj.proj.1.": "stem.conv1.norm.",
    "downsample_layers.0.proj.proj.3.": "stem.conv2.conv.",
    "downsample_layers.0.proj.proj.4.": "stem.conv2.norm.",
    "downsample_layers.0.norm.": "stem.norm.",
    ".cpe.0.proj.": ".position.",
    ".cpe.1.proj.": ".position2.",
    ".attn.": ".mixer.",
    ".local_mp.": ".concentration.",
}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: L2ViT) -> dict[str, Tensor]:
    """A checkpoint under this library's names.

    It may be one of L2ViT's authors, or of this library.

    Raises:
        CheckpointError: if it is the checkpoint of another model.
    """
    state_dict = dict(unwrap(state_dict))
    if "downsample_layers.0.norm.weight" in state_dict:
        state_dict = {_our_name(name): value for name, value in state_dict.items()}
    state_dict = convert_mixers(state_dict, model)
    check_model(state_dict, model)
    return state_dict


def _our_name(name: str) -> str:
    name = rename(name, AUTHORS_NAMES)
    name = re.sub(r"^stages\.(\d+)\.", r"stages.\1.blocks.", name)
    name = re.sub(r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample.", name)
    return re.sub(r"^head\.", "head.fc.", name)
