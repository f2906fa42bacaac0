"""Layers that several skeletons, blocks and mixers share.

Activations are channels-last in memory: tokens are (B, N, C) or maps (B, H, W, C), and a
convolution's (B, C, H, W) is a view of the latter. Each class is one leaf module whose `forward`
runs whenever the layer is used, or a container of such modules.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import DropPath, is_exporting
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor, nn
from torch.fx import Proxy

from ..kernels.batch_norm import batch_norm
from ..kernels.conv2d import conv2d
from ..kernels.depthwise_conv2d import depthwise_conv2d
from ..kernels.runtime.activation import Activation, activate
from ..kernels.runtime.dispatch import is_direct_call
from ..kernels.runtime.private import has_hooks
from ..kernels.scaled_add import scaled_add
from .activations import kernel_activation
from .norms import LayerNorm, fold_into_convolution, is_plain
from .tracing import record_call

# timm's register_notrace_function reaches what a module's own forward calls, and no further.
torch.fx.wrap("scaled_add")


@register_notrace_function
def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """`x` (B, C, H, W), padded with zeros at the bottom and right to multiples of `multiple`."""
    if isinstance(x, Proxy):
        return record_call(pad_to_multiple, x, multiple)
    bottom, right = ((side + multiple - 1) // multiple * multiple - side for side in x.shape[2:])
    # Comparing sizes here would specialise the exported graph.
    if is_exporting() or bottom or right:
        return F.pad(x, (0, right, 0, bottom))
    return x


@register_notrace_function
def check_image(x: Tensor, in_chans: int, least: int = 1) -> Tensor:
    """The images `x`, if the model can take them.

    Args:
        x: images, expected to be (B, in_chans, H, W).
        in_chans: channels that the model takes.
        least: the smallest side in pixels that the model takes.

    Raises:
        ValueError: if the images have another shape, or a smaller side.
    """
    if isinstance(x, Proxy):
        return record_call(check_image, x, in_chans, least)
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"images have shape {tuple(x.shape)}, expected (B, {in_chans}, H, W)")
    if x.shape[2] < least or x.shape[3] < least:
        raise ValueError(
            f"images are {x.shape[2]} x {x.shape[3]} pixels, at least {least} x {least} are "
            f"needed, because the model divides each side by {least}: resize or pad them"
        )
    return x


class Conv2d(nn.Conv2d):
    """A convolution whose result is channels-last in memory, and its activation if it has one.

    Args:
        activation: 'gelu', 'relu' or None; `fuse()` of the layers around a convolution sets it.
        others: as in `torch.nn.Conv2d`.
    """

    # PyTorch declares tuples of any length.
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]

    def __init__(self, *args: Any, activation: Activation | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation: Activation | None = activation

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) to (B, O, H', W')."""
        if isinstance(x, Proxy):
            return record_call(self, x)
        if self.padding_mode != "zeros":
            y = super().forward(x)
            return y if self.activation is None else getattr(F, self.activation)(y)
        return conv2d(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            activation=self.activation,
        )


class BatchNormAct2d(nn.BatchNorm2d):
    """Batch normalisation and its activation as one layer, like timm's class of this name.

    Args:
        channels: C.
        activation: 'gelu', 'relu' or None.
        others: as in `torch.nn.BatchNorm2d`.
    """

    # None only where `forward` runs PyTorch's own layer.
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, channels: int, *, activation: Activation | None = None, **kwargs: Any
    ) -> None:
        super().__init__(channels, **kwargs)
        self.activation: Activation | None = activation
        # Whether the processes of a distributed training share their statistics.
        self.synchronized = False

    def init_non_persistent_buffers(self) -> None:
        """Nothing, for the statistics are persistent.

        timm's name for it, by which transformers' `TimmBackbone` (5.24) leaves the layer alone. It
        sets the statistics of every other batch norm to 0 and 1 after their weights are loaded.
        """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        if isinstance(x, Proxy):
            return record_call(self, x)
        if not (self.affine and self.track_running_stats and self.momentum is not None):
            y = super().forward(x)
            return y if self.activation is None else getattr(F, self.activation)(y)
        if self.training:
            self.num_batches_tracked.add_(1)
        shared = self.training and self.synchronized and dist.is_initialized()
        return batch_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
            activation=self.activation,
            process_group=dist.group.WORLD if shared else None,
        )


PYTORCHS_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def synchronize_batch_norms(model: nn.Module, convert: bool = True) -> nn.Module:
    """Let every batch norm take its statistics over all processes of a distributed training.

    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` is for PyTorch's own layers; it would replace
    `BatchNormAct2d` by a slower layer. Here it converts all others.

    Args:
        model: its layers are changed in place.
        convert: whether PyTorch's own layers become `SyncBatchNorm`, which needs a GPU, or stay as
            they are.

    Returns:
        The model; a new module, if the model is itself a batch norm of PyTorch's.
    """
    if isinstance(model, BatchNormAct2d):
        model.synchronized = True
    elif isinstance(model, PYTORCHS_BATCH_NORMS):
        if not convert:
            return model
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, child in model.named_children():
        setattr(model, name, synchronize_batch_norms(child, convert))
    return model


class ConvNormAct(nn.Module):
    """act(norm(conv(x))): a convolution with its bias, a batch norm, an activation.

    An activation that the kernels know is part of the batch norm's layer; any other is a module
    `act` of its own.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, bias: as in `torch.nn.Conv2d`.
        act_layer: a callable that makes the activation, or None for no activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        act_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        act = None if act_layer is None else act_layer()
        self.activation = kernel_activation(act)
        self.conv = Conv2d(
            in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=bias
        )
        self.norm = BatchNormAct2d(out_channels, activation=self.activation)
        self.act = act if self.activation is None else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) to (B, O, H', W')."""
        x = self.norm(self.conv(x))
        if self.act is not None:
            return self.act(x)
        # A norm that stands in its place, such as PyTorch's SyncBatchNorm, computes no activation.
        if self.activation is not None and not isinstance(self.norm, BatchNormAct2d):
            return getattr(F, self.activation)(x)
        return x

    def fuse(self) -> nn.Module:
        """One convolution that computes the same in evaluation; itself, if a part was replaced."""
        if not is_plain(self.conv, Conv2d) or type(self.norm) is not BatchNormAct2d:
            return self
        fused = fuse_conv_norm(self.conv, self.norm).train(self.training)
        return fused if self.act is None else nn.Sequential(fused, self.act)


def fuse_conv_norm(conv: Conv2d, norm: BatchNormAct2d) -> Conv2d:
    """One convolution that computes act(norm(conv(x))) as evaluation does."""
    fused = Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        padding_mode=conv.padding_mode,
        activation=norm.activation,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    with torch.no_grad():
        scale, shift = batch_norm_affine(norm)
        fused.weight.copy_(conv.weight * scale[:, None, None, None])
        fused.get_parameter("bias").copy_(
            shift if conv.bias is None else torch.addcmul(shift, conv.bias, scale)
        )
    return fused.requires_grad_(conv.weight.requires_grad)


def batch_norm_affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) that a batch norm applies in evaluation.

    Raises:
        ValueError: if it has no running statistics, so that scale and shift are not fixed.
    """
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise ValueError("norm has no running statistics: make it with track_running_stats=True")
    scale = (variance + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


def normalize_tokens(norm: nn.Module, x: Tensor) -> Tensor:
    """The batch norm of tokens or a map (..., C), which the norm takes as (tokens, C, 1, 1).

    Seen as (B, C, H, W), tokens would have `torch.export` ask whether W is above 1.
    """
    return norm(x.reshape(-1, x.shape[-1], 1, 1)).view(x.shape)


def absorb_norm(norm: nn.Module, layer: nn.Module) -> nn.Module:
    """Multiply a batch norm, as evaluation computes it, into the layer that takes its output.

    Args:
        norm: the norm.
        layer: a linear layer, or a convolution without padding; it is changed in place.

    Returns:
        What takes the norm's place: the identity, or the norm itself if it cannot be absorbed.
    """
    if type(norm) is not BatchNormAct2d or norm.activation is not None:
        return norm
    if type(layer) is Conv2d and (layer.padding != (0, 0) or layer.groups != 1):
        return norm
    if not (is_plain(layer) or is_plain(layer, Conv2d)) or layer.bias is None:
        return norm
    weight = layer.get_parameter("weight")
    with torch.no_grad():
        scale, shift = (t.view(-1, *(1,) * (weight.ndim - 2)) for t in batch_norm_affine(norm))
        layer.get_parameter("bias").add_((weight * shift).flatten(1).sum(1))
        weight.mul_(scale)
    return nn.Identity()


class Downsample(ConvNormAct):
    """A `ConvNormAct` of 3 x 3 pixels and stride 2, from and to a map (B, H, W, C)."""

    def __init__(
        self, in_channels: int, out_channels: int, act_layer: Callable[..., nn.Module] | None = None
    ) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2, padding=1, act_layer=act_layer)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def fuse(self) -> nn.Module:
        fused = super().fuse()
        return self if fused is self else ChannelsLast(fused)


class ChannelsLast(nn.Module):
    """Calls a module of maps (B, C, H, W) with a map (B, H, W, C), and returns such a map."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PatchEmbed(nn.Module):
    """Patches of an image, projected and normalised: (B, C, H, W) to (B, H', W', dim).

    Args:
        in_chans: channels of the images.
        dim: channels of the result.
        kernel_size, stride, padding: of the convolution that projects a patch. Where the patches
            do not overlap, sides that the stride does not divide are padded with zeros at the
            bottom and right.
        norm_layer: a callable that makes the norm of `dim` channels, or None for no norm.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        kernel_size: int,
        *,
        stride: int | None = None,
        padding: int = 0,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.pad = stride is None
        self.proj = Conv2d(
            in_chans, dim, kernel_size, stride=stride or kernel_size, padding=padding
        )
        self.norm = nn.Identity() if norm_layer is None else norm_layer(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = check_image(x, self.proj.in_channels)
        if self.pad:
            x = pad_to_multiple(x, self.proj.stride[0])
        return self.norm(self.proj(x).permute(0, 2, 3, 1))

    def fuse(self) -> nn.Module:
        """This layer, whose convolution has taken in the norm, if that is constant."""
        self.norm = fold_into_convolution(self.norm, self.proj)
        return self


class PatchDownsample(PatchEmbed):
    """`PatchEmbed`, which takes a map (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2))


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution that keeps the size of its map, and its activation if it has one.

    PyTorch computes it if its attributes have been changed so that it is another convolution.

    Args:
        channels: C.
        kernel_size: odd, of a square window, or its rows and columns.
        dilation: distance of the tokens that it reads.
        activation: of the result, 'gelu', 'relu' or None.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        dilation: int = 1,
        activation: Activation | None = None,
    ) -> None:
        square = isinstance(kernel_size, int)
        height, width = (kernel_size, kernel_size) if square else kernel_size
        super().__init__(
            channels,
            channels,
            (height, width),
            padding=(dilation * (height // 2), dilation * (width // 2)),
            dilation=dilation,
            groups=channels,
        )
        self.activation: Activation | None = activation

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W), both channels-last in memory."""
        if isinstance(x, Proxy):
            return record_call(self, x)
        if not self._keeps_size():
            return activate(super().forward(x), self.activation)
        y = depthwise_conv2d(
            x.permute(0, 2, 3, 1),
            self.weight,
            self.bias,
            dilation=self.dilation[0],
            result_activation=self.activation,
        )
        return y.permute(0, 3, 1, 2)

    def _keeps_size(self) -> bool:
        """Whether this is still the convolution that the class is named after."""
        height, width = self.kernel_size
        step = self.dilation[0]
        return (
            self.groups == self.in_channels == self.out_channels
            and height % 2 == width % 2 == 1
            and self.dilation == (step, step)
            and self.padding == (step * (height // 2), step * (width // 2))
            and self.stride == (1, 1)
            and self.padding_mode == "zeros"
        )


class ActDepthwise(nn.Module):
    """conv(a(x)) of a map x (B, H, W, C), where conv is depthwise.

    Args:
        channels: C.
        kernel_size: k, odd.
        activation: the activation a, 'gelu', 'relu' or None for the identity.
    """

    # Whether a(x) is added to the result.
    residual: ClassVar[bool] = False

    def __init__(
        self, channels: int, kernel_size: int, activation: Activation | None = None
    ) -> None:
        super().__init__()
        self.activation: Activation | None = activation
        conv = nn.Conv2d(channels, channels, kernel_size, groups=channels)
        self.weight, self.bias = conv.weight, conv.bias

    def extra_repr(self) -> str:
        channels, _, kernel, _ = self.weight.shape
        return f"{channels}, kernel_size={kernel}, activation={self.activation}"

    def forward(
        self, x: Tensor, branch: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """The output for x, or for x + scale * branch; the scale has C elements, or None is 1."""
        if isinstance(x, Proxy):
            return record_call(self, x, branch, scale)
        return depthwise_conv2d(
            x,
            self.weight,
            self.bias,
            activation=self.activation,
            residual=self.residual,
            branch=branch,
            scale=None if scale is None else scale.flatten(),
        )


class ResidualDepthwise(ActDepthwise):
    """u + conv(u) of a map x (B, H, W, C), where u = a(x) and conv is depthwise."""

    residual = True


# As a decorator it would hide the classes from type checkers.
for leaf in (Conv2d, BatchNormAct2d, DepthwiseConv2d, ActDepthwise, ResidualDepthwise):
    register_notrace_module(leaf)


def drop_images(drop: nn.Module, branch: Tensor) -> tuple[Tensor, Tensor | None]:
    """A branch under stochastic depth, as a residual sum takes it: (branch, factors or None).

    In training timm's `DropPath` is called with ones in place of the branch (B, ..., C). It draws
    the same, and its result (B, 1, ..., 1) is what each image is multiplied by, which the sum does
    as it reads the branch. Another module, or one with hooks, is called with the branch.
    """
    if (
        not drop.training
        or type(drop) is not DropPath
        or not drop.drop_prob
        or not is_direct_call((branch,))
        or has_hooks(drop)
        or isinstance(branch, Proxy)
    ):
        return drop(branch), None
    return branch, drop(branch.new_ones(branch.shape[:1] + (1,) * (branch.ndim - 1)))


def add_residual(
    x: Tensor, branch: Tensor, scale: Tensor | None = None, keep: Tensor | None = None
) -> Tensor:
    """x + keep * scale * branch.

    Args:
        x, branch: (B, ..., C).
        scale: a layer scale (arXiv:2103.17239) of C elements, or None for 1.
        keep: factors of the images, (B, 1, ..., 1), or None for 1; see `drop_images`.
    """
    if scale is None and keep is None:
        return x + branch
    return scaled_add(x, branch, None if scale is None else scale.flatten(), keep)


def add_and_norm(
    norm: nn.Module,
    x: Tensor,
    branch: Tensor,
    scale: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual sum s of `add_residual`, and norm(s); a `LayerNorm` computes both at once."""
    # A user's class that derives from `LayerNorm` may take the tokens alone.
    if getattr(type(norm), "forward", None) is LayerNorm.forward:
        return norm(x, branch, scale, keep)
    x = add_residual(x, branch, scale, keep)
    return x, norm(x)


# timm's names of the ways to pool tokens (B, P + N, C), the class token first.
TOKEN_POOLS = ("", "token", "avg", "max", "avgmax")


def check_token_pool(pool_type: str) -> str:
    """`pool_type`, if it names a pooling of tokens.

    Raises:
        ValueError: if it is not.
    """
    if pool_type not in TOKEN_POOLS:
        raise ValueError(f"global_pool is {pool_type!r}, expected one of {TOKEN_POOLS}")
    return pool_type


def make_classifier(features: int, num_classes: int, like: Tensor | None = None) -> nn.Module:
    """A linear layer on the device and in the dtype of `like`; the identity for 0 classes."""
    if not num_classes:
        return nn.Identity()
    kind = {} if like is None else {"device": like.device, "dtype": like.dtype}
    return nn.Linear(features, num_classes, **kind)
