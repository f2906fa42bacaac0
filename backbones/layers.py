"""Layers that several skeletons and mixers share. Maps are channels-last: (B, H, W, C)."""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, is_exporting
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from ..kernels.batch_norm import batch_norm
from ..kernels.conv2d import conv2d
from ..kernels.depthwise_conv2d import depthwise_conv2d
from ..kernels.layer_norm import add_layer_norm, layer_norm
from ..kernels.runtime.activation import Activation, activate

# timm's register_notrace_function reaches what a module's own forward calls, and no further.
torch.fx.wrap("batch_norm")
torch.fx.wrap("conv2d")


@register_notrace_function
def padded(x: Tensor, multiple: int) -> Tensor:
    """(B, C, H, W) with zeros at the bottom and right up to sides that `multiple` divides."""
    bottom, right = ((side + multiple - 1) // multiple * multiple - side for side in x.shape[2:])
    # A question for the sizes would fix an exported graph's.
    if is_exporting() or bottom or right:
        return F.pad(x, (0, right, 0, bottom))
    return x


@register_notrace_function
def checked_image(x: Tensor, in_chans: int, multiple: int) -> Tensor:
    """An image (B, in_chans, H, W), `padded`.

    Raises:
        ValueError: if it has another shape.
    """
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"images have shape {tuple(x.shape)}, expected (B, {in_chans}, H, W)")
    return padded(x, multiple)


def convolved(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The convolution of (B, C, H, W), as a channels-last map (B, H', W', C')."""
    y = conv2d(x, conv.weight, conv.bias, stride=conv.stride, padding=conv.padding)
    return y.permute(0, 2, 3, 1)


class PatchEmbed(nn.Module):
    """Patches of a padded image, each projected: (B, C, H, W) to (B, H / P, W / P, dim)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return convolved(checked_image(x, self.proj.in_channels, self.proj.stride[0]), self.proj)


@register_notrace_module
class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution of a channels-last map, size-preserving at stride 1.

    Args:
        channels: C.
        kernel_size: k, odd.
        activation: applied to the input first: 'gelu' or none.
        residual: add the (activated) input to the result.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        activation: str | None = None,
        residual: bool = False,
    ) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.activation = activation
        self.residual = residual

    def forward(self, x: Tensor, branch: Tensor | None = None) -> Tensor:
        """Of x, or of x + branch."""
        return depthwise_conv2d(
            x if branch is None else x + branch,
            self.weight,
            self.bias,
            activation=self.activation,
            residual=self.residual,
        )


@register_notrace_module
class LayerNorm(nn.LayerNorm):
    """Layer normalisation over channels, in the dtype of its input even under autocast."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, eps=self.eps)


@register_notrace_module
class AddLayerNorm(LayerNorm):
    """x + branch, and the `LayerNorm` of that, in one pass.

    Without a branch, x itself and its norm: a block that goes on from both has their gradients
    added where the norm's is made, and not in a pass of its own.
    """

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if branch is None:
            return x, layer_norm(x, self.weight, self.bias, eps=self.eps)
        return add_layer_norm(x, branch, self.weight, self.bias, eps=self.eps)


@register_notrace_module
class Linear(nn.Linear):
    """x W^T + b, or scale * (x W^T + b) with a layer scale of as many elements as b."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if scale is None else y * scale.flatten()


class NormedPatchEmbed(PatchEmbed):
    """`PatchEmbed` with a norm, of an image: (B, C, H, W) to (B, H / P, W / P, dim)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__(in_chans, dim, patch_size)
        self.norm = LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class Mlp(nn.Module):
    """Feed-forward network, fc2(GELU(fc1(x))).

    Args:
        dim: channels.
        hidden_dim: channels between the layers.
        approximate: of GELU, 'none' or 'tanh'.
    """

    def __init__(self, dim: int, hidden_dim: int, approximate: str = "none") -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class TransformerBlock(nn.Module):
    """Pre-norm residual block: x <- x + mixer(norm1(x)); x <- x + mlp(norm2(x)).

    Args:
        dim: channels.
        mixer: the token mixer, called `mixer(x, size)`.
        mlp_ratio: hidden width of the feed-forward network over its width.
        drop_path: rate of stochastic depth of both branches.
        eps: of the norms.
    """

    def __init__(
        self, dim: int, mixer: nn.Module, mlp_ratio: float, drop_path: float, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.norm1 = AddLayerNorm(dim, eps)
        self.mixer = mixer
        self.norm2 = AddLayerNorm(dim, eps)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens (B, P + H * W, C) of a map of `size` (H, W) and P class tokens before it."""
        x, y = self.norm1(x)
        x, y = self.norm2(x, self.drop_path(self.mixer(y, size)))
        return x + self.drop_path(self.mlp(y))


class ConvMlp(nn.Module):
    """Feed-forward network with a depthwise 3 x 3 convolution on its hidden width.

    u = GELU(fc1(x)), u <- u + depthwise(u), scale * fc2(u).
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.depthwise = DepthwiseConv2d(hidden_dim, 3, activation="gelu", residual=True)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.fc2(self.depthwise(self.fc1(x)), scale)


def _is_usual(norm: nn.Module) -> bool:
    """Whether a batch norm is what its name says, with weights and running statistics."""
    usual = type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats
    return usual and norm.momentum is not None


def normalized(
    x: Tensor, norm: nn.Module, activation: Activation | None = None, offset: Tensor | None = None
) -> Tensor:
    """a(norm(x + offset)), of (B, C, H, W); a batch norm's training step in one operator."""
    x = x if offset is None else x + offset.to(x.dtype)[:, None, None]
    if not norm.training or not _is_usual(norm):
        return activate(norm(x), activation)
    norm.num_batches_tracked.add_(1)
    return batch_norm(
        x,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        momentum=norm.momentum,
        eps=norm.eps,
        activation=activation,
    )


def normalized_conv2d(
    x: Tensor, conv: nn.Conv2d, norm: nn.Module, activation: Activation | None = None
) -> Tensor:
    """a(norm(conv(x))); in evaluation mode as one convolution, which saves a pass over its map."""
    if norm.training or not _is_usual(norm):
        y = conv2d(x, conv.weight, stride=conv.stride, padding=conv.padding)
        return normalized(y, norm, activation, offset=conv.bias)
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight = conv.weight * scale[:, None, None, None]
    shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    bias = torch.addcmul(norm.bias, shift, scale)
    return conv2d(x, weight, bias, stride=conv.stride, padding=conv.padding, activation=activation)


class ConvNorm(nn.Sequential):
    """3 x 3 convolution of stride 2 and batch norm, from and to a channels-last map."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return normalized_conv2d(x.permute(0, 3, 1, 2), self.conv, self.norm).permute(0, 2, 3, 1)


# Of tokens (B, 1 + N, C), the class token first.
TOKEN_POOLS = ("", "token", "avg", "max", "avgmax")


def checked_pool(pool_type: str) -> str:
    """`pool_type`, if it is a pooling of tokens.

    Raises:
        ValueError: if it is not.
    """
    if pool_type not in TOKEN_POOLS:
        raise ValueError(f"global_pool is {pool_type!r}, expected one of {TOKEN_POOLS}")
    return pool_type


def classifier(features: int, num_classes: int, like: Tensor) -> nn.Module:
    """A linear layer on the device and in the dtype of `like`; the identity of no classes."""
    if not num_classes:
        return nn.Identity()
    return nn.Linear(features, num_classes, device=like.device, dtype=like.dtype)
