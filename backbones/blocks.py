"""Residual blocks: how a token mixer and a feed-forward network are put together.

Every block is built as `block(dim, mixer, **options)` and called as `block(x, context)` with
tokens (B, P + H * W, C), so that any skeleton can hold any block.
"""

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

import timm.layers.mlp
import torch
from timm.layers import DropPath, GluMlp, Mlp, SwiGLUPacked
from torch import Tensor, nn
from torch.fx import Proxy

from ..kernels.runtime.private import has_forward_hooks
from .activations import ActLayer, resolve_act_layer
from .context import Context
from .layers import ResidualDepthwise, add_and_norm, add_residual, drop_images
from .linear import fuse_linear
from .mlps import ConvMlp, DepthwiseMlp
from .norms import LayerNorm, NormLayer, fold_into_linear, is_plain, resolve_norm_layer
from .tracing import record_module

# A class, a partial of one, or a name; called as timm's MLPs are.
MlpLayer = str | Callable[..., nn.Module]
# Feed-forward networks that convolve, and so need the map's size.
MAP_MLPS = (ConvMlp, DepthwiseMlp)


def resolve_mlp_layer(mlp_layer: MlpLayer) -> Callable[..., nn.Module]:
    """The callable that makes a feed-forward network.

    Args:
        mlp_layer: 'convmlp', 'depthwisemlp', the name of one of timm's MLPs ('mlp', 'glumlp',
            'swiglu', ...), a class or a partial of one.

    Raises:
        ValueError: if there is no MLP of that name.
    """
    if not isinstance(mlp_layer, str):
        return mlp_layer
    classes: dict[str, Any] = {
        name.lower(): layer
        for name, layer in vars(timm.layers.mlp).items()
        if isinstance(layer, type) and layer.__module__ == timm.layers.mlp.__name__
    }
    classes |= {layer.__name__.lower(): layer for layer in MAP_MLPS}
    classes["swiglupacked"] = SwiGLUPacked  # a partial, which timm names like its classes
    found = classes.get(mlp_layer.lower())
    if found is None:
        raise ValueError(
            f"mlp_layer is {mlp_layer!r}, which is neither 'convmlp' or 'depthwisemlp' nor an MLP "
            "of timm: give such a name, a class or a partial"
        )
    return found


def make_mlp(
    mlp_layer: MlpLayer | None,
    default: Callable[..., nn.Module],
    dim: int,
    hidden: int,
    act_layer: ActLayer | None,
    default_act: Callable[..., nn.Module] = nn.GELU,
) -> nn.Module:
    """A block's feed-forward network.

    Args:
        mlp_layer: a class, a partial of one or a name, or None for `default`. A network that is
            not the default keeps its own default activation, unless `act_layer` is given.
        default: the block's own network.
        dim, hidden: channels of the tokens and of the hidden layer.
        act_layer: a class, a partial of one or a name, or None.
        default_act: the activation of the block's own network.
    """
    if mlp_layer is None:
        act = resolve_act_layer(act_layer, default_act)
        return default(dim, hidden, act_layer=act)
    layer = resolve_mlp_layer(mlp_layer)
    if act_layer is None:
        return layer(dim, hidden)
    return layer(dim, hidden, act_layer=resolve_act_layer(act_layer, None))


def make_drop_path(rate: float) -> nn.Module:
    """A module of stochastic depth at `rate`, or the identity if the rate is 0."""
    return DropPath(rate) if rate else nn.Identity()


class Block(nn.Module):
    """The frame of a block with a mixer and a feed-forward network.

    Subclasses set `mixer` and `mlp`. The two branches are multiplied by the layer scales `gamma1`
    and `gamma2` of C elements, where there are any.
    """

    gamma1: Tensor | None
    gamma2: Tensor | None
    mixer: nn.Module
    mlp: nn.Module

    def set_layer_scales(self, dim: int, initial: float | None) -> None:
        """Make the layer scales, which start at `initial`; None makes a block without them."""
        # They have rank 4, so that weight decay, which leaves vectors out, acts on them as in the
        # code of RAVLT's and MAViT's authors.
        for name in ("gamma1", "gamma2"):
            scale = None if initial is None else nn.Parameter(torch.full((1, 1, 1, dim), initial))
            self.register_parameter(name, scale)

    def feed_forward(self, x: Tensor, context: Context) -> Tensor:
        """The output of the feed-forward network, which gets the context if it convolves."""
        mlp = self.mlp
        return mlp(x, context) if isinstance(mlp, MAP_MLPS) else mlp(x)

    def mix(self, x: Tensor, stream: Tensor, context: Context) -> Tensor:
        """The mixer's output for the tokens `x`, which were made from the residual stream."""
        context.stream = stream
        if isinstance(x, Proxy):
            mixed = record_module(self.mixer, x, context)
        else:
            mixed = self.mixer(x, context)
        context.stream = None
        return mixed

    def fuse(self) -> nn.Module:
        """This block, with its layer scales multiplied into the linear layers before them."""
        for name, layer in (
            ("gamma1", getattr(self.mixer, "out_proj", None)),
            ("gamma2", getattr(self.mlp, "fc2", None)),
        ):
            gamma = getattr(self, name)
            if gamma is None or not is_plain(layer):
                continue
            with torch.no_grad():
                layer.weight.mul_(gamma.view(-1, 1))
                if layer.bias is not None:
                    layer.bias.mul_(gamma.flatten())
            setattr(self, name, None)
        fuse_linear(self)
        return self


class PreNormBlock(Block):
    """A block whose norms stand before its mixer and before its feed-forward network alone."""

    norm1: nn.Module
    norm2: nn.Module

    def fuse(self) -> nn.Module:
        """This block, with its layer scales and constant norms multiplied into linear layers."""
        absorb_norm = getattr(self.mixer, "absorb_norm", None)
        if absorb_norm is not None:
            self.norm1 = absorb_norm(self.norm1)
        if isinstance(self.mlp, (Mlp, GluMlp, *MAP_MLPS)):
            self.norm2 = fold_into_linear(self.norm2, self.mlp.fc1)
        return super().fuse()


class TransformerBlock(PreNormBlock):
    """Pre-norm residual block: x <- x + mixer(norm1(x)); x <- x + mlp(norm2(x)).

    Args:
        dim: channels C.
        mixer: the token mixer, called `mixer(x, context)`.
        mlp_ratio: hidden width of the feed-forward network over its width.
        drop_path: rate of stochastic depth of both branches.
        eps: epsilon of the layer norms, unless `norm_layer` is given.
        layer_scale: initial value of the layer scales of both branches, or None for no scales.
        norm_layer, act_layer, mlp_layer: a class, a partial of one or a name, or None for
            `LayerNorm`, GELU and timm's `Mlp`.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        layer_scale: float | None = None,
        norm_layer: NormLayer | None = None,
        act_layer: ActLayer | None = None,
        mlp_layer: MlpLayer | None = None,
    ) -> None:
        super().__init__()
        make_norm = resolve_norm_layer(norm_layer, partial(LayerNorm, eps=eps))
        self.norm1 = make_norm(dim)
        self.mixer = mixer
        self.drop_path1 = make_drop_path(drop_path)
        self.norm2 = make_norm(dim)
        self.mlp = make_mlp(mlp_layer, Mlp, dim, int(mlp_ratio * dim), act_layer)
        self.drop_path2 = make_drop_path(drop_path)
        self.set_layer_scales(dim, layer_scale)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Tokens (B, P + H * W, C) of the map of `context` to tokens of the same shape."""
        branch, keep = drop_images(self.drop_path1, self.mix(self.norm1(x), x, context))
        x, y = add_and_norm(self.norm2, x, branch, self.gamma1, keep)
        branch, keep = drop_images(self.drop_path2, self.feed_forward(y, context))
        return add_residual(x, branch, self.gamma2, keep)


class PostNormBlock(Block):
    """SOFT's block: x <- norm1(x + drop(mixer(x))); x <- norm2(x + drop(mlp(x))).

    Args:
        drop_path: rate of an ordinary, elementwise dropout of both branches, which SOFT's code has
            in place of stochastic depth.
        others: as in `TransformerBlock`; the default activation is GELU in its tanh approximation.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        eps: float = 1e-5,
        layer_scale: float | None = None,
        norm_layer: NormLayer | None = None,
        act_layer: ActLayer | None = None,
        mlp_layer: MlpLayer | None = None,
    ) -> None:
        super().__init__()
        make_norm = resolve_norm_layer(norm_layer, partial(LayerNorm, eps=eps))
        gelu = partial(nn.GELU, approximate="tanh")
        self.mixer = mixer
        self.drop1 = nn.Dropout(drop_path)
        self.norm1 = make_norm(dim)
        self.mlp = make_mlp(mlp_layer, Mlp, dim, int(mlp_ratio * dim), act_layer, gelu)
        self.drop2 = nn.Dropout(drop_path)
        self.norm2 = make_norm(dim)
        self.set_layer_scales(dim, layer_scale)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Tokens (B, P + H * W, C) of the map of `context` to tokens of the same shape."""
        branch = self.drop1(self.mix(x, x, context))
        x = add_and_norm(self.norm1, x, branch, self.gamma1)[1]
        branch = self.drop2(self.feed_forward(x, context))
        return add_and_norm(self.norm2, x, branch, self.gamma2)[1]


class PositionBlock(PreNormBlock):
    """The block of RAVLT and MAViT: conditional positions, mixer, network with a convolution.

    x <- x + depthwise(x); x <- x + gamma1 mixer(norm1(x)); x <- x + gamma2 mlp(norm2(x)).

    Args:
        others: as in `TransformerBlock`; the feed-forward network is `ConvMlp` by default.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        mlp_ratio: float = 3.5,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        layer_scale: float | None = 1.0,
        norm_layer: NormLayer | None = None,
        act_layer: ActLayer | None = None,
        mlp_layer: MlpLayer | None = None,
    ) -> None:
        super().__init__()
        make_norm = resolve_norm_layer(norm_layer, partial(LayerNorm, eps=eps))
        self.position = ResidualDepthwise(dim, 3)
        self.norm1 = make_norm(dim)
        self.mixer = mixer
        self.drop_path1 = make_drop_path(drop_path)
        self.norm2 = make_norm(dim)
        self.mlp = make_mlp(mlp_layer, ConvMlp, dim, int(mlp_ratio * dim), act_layer)
        self.drop_path2 = make_drop_path(drop_path)
        self.set_layer_scales(dim, layer_scale)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Tokens (B, H * W, C) of the map of `context` to tokens of the same shape."""
        x = self.add_position(x, context)
        branch, keep = drop_images(self.drop_path1, self.mix(self.norm1(x), x, context))
        x, y = add_and_norm(self.norm2, x, branch, self.gamma1, keep)
        return self.add_feed_forward(x, y, context)

    def add_position(self, x: Tensor, context: Context) -> Tensor:
        """The tokens with their positions, and with the branch that the block before has left."""
        x = context.as_map(x, "a block of positions")
        if context.pending is None:
            return self.position(x).flatten(1, 2)
        branch, scale = context.pending
        context.pending = None
        branch = torch.unflatten(branch, 1, context.size)
        return self.position(x, branch, scale).flatten(1, 2)

    def add_feed_forward(self, x: Tensor, y: Tensor, context: Context) -> Tensor:
        """The stream `x` with the feed-forward branch of `y`, or without it if it is deferred."""
        branch, keep = drop_images(self.drop_path2, self.feed_forward(y, context))
        if context.defers:  # which is in inference alone, so that no image is dropped
            context.pending = branch, self.gamma2
            return x
        return add_residual(x, branch, self.gamma2, keep)


class DoublePositionBlock(PositionBlock):
    """NaLaFormer's block: `PositionBlock` with conditional positions before each branch.

    x <- x + depthwise(x); x <- x + gamma1 mixer(norm1(x));
    x <- x + depthwise2(x); x <- x + gamma2 mlp(norm2(x)).

    Args:
        others: as in `PositionBlock`.
    """

    def __init__(self, dim: int, mixer: nn.Module, **options: Any) -> None:
        super().__init__(dim, mixer, **options)
        self.position2 = ResidualDepthwise(dim, 3)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = self.add_position(x, context)
        branch = self.drop_path1(self.mix(self.norm1(x), x, context))
        x, branch = (tokens.unflatten(1, context.size) for tokens in (x, branch))
        x = self.position2(x, branch, self.gamma1).flatten(1, 2)
        return self.add_feed_forward(x, self.norm2(x), context)


def may_defer(blocks: Iterable[nn.Module]) -> bool:
    """Whether each of a stage's blocks may leave its last branch for the next one to add.

    A position block's convolution adds it where it reads its input, which saves two passes over
    the map. Training keeps the sum anyway; and a hook must see the block's whole output.
    """
    return not torch.is_grad_enabled() and all(
        type(block) in (PositionBlock, DoublePositionBlock)
        and type(block.position) is ResidualDepthwise
        and not has_forward_hooks(block)
        for block in blocks
    )


def add_pending(x: Tensor, context: Context) -> Tensor:
    """The residual stream with the branch that the last block left, if it left one."""
    if context.pending is None:
        return x
    branch, scale = context.pending
    context.pending = None
    return add_residual(x, branch, scale)


BLOCKS: dict[str, type[nn.Module]] = {
    "double_position": DoublePositionBlock,
    "position": PositionBlock,
    "post_norm": PostNormBlock,
    "transformer": TransformerBlock,
}

# A class, a partial of one, or a key of `BLOCKS`.
BlockLayer = str | Callable[..., nn.Module]
# One block for all depths; one per stage; within a stage, one per depth; or an `Alternate`.
BlockLayers = BlockLayer | Sequence[BlockLayer | Sequence[BlockLayer]]


def resolve_block(block: BlockLayer) -> Callable[..., nn.Module]:
    """The callable that makes a block.

    Raises:
        ValueError: if there is no block of that name.
    """
    if not isinstance(block, str):
        return block
    if block not in BLOCKS:
        near = get_close_matches(block, BLOCKS) or sorted(BLOCKS)
        raise ValueError(f"there is no block {block!r}; did you mean {', '.join(near)}?")
    return BLOCKS[block]


class Alternate(tuple):
    """Choices that the blocks of every stage take in turn, beginning with the first."""


def choices_by_depth(name: str, choice: Any, depths: Sequence[int]) -> list[list[Any]]:
    """The choice for every depth of every stage.

    Args:
        name: the argument's name, for messages.
        choice: one choice for all depths, an `Alternate`, or a sequence with one per stage, each
            of which may itself be a sequence with one per depth.
        depths: the number of blocks of each stage.

    Raises:
        ValueError: if there are not as many choices as stages, or as depths in a stage.
    """
    if isinstance(choice, Alternate):
        return [[choice[j % len(choice)] for j in range(depth)] for depth in depths]
    single = not isinstance(choice, (tuple, list))
    stages = [choice] * len(depths) if single else list(choice)
    if len(stages) != len(depths):
        raise ValueError(f"{name} names {len(stages)} stages, the model has {len(depths)}")
    blocks = [
        list(names) if isinstance(names, (tuple, list)) else [names] * depth
        for names, depth in zip(stages, depths, strict=True)
    ]
    for i, (names, depth) in enumerate(zip(blocks, depths, strict=True)):
        if len(names) != depth:
            raise ValueError(f"{name} names {len(names)} blocks of stage {i}, which has {depth}")
    return blocks
