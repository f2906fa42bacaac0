"""Focused linear attention (FLatten Transformer; arXiv:2308.00442, ICCV 2023)."""

import math

import torch
import torch.nn.functional as F
from timm.layers import is_exporting
from torch import Tensor, nn

from ...kernels.focused_linear_attention import focused_linear_attention
from ...kernels.runtime.dispatch import cache_constants, without_autocast
from ..context import Context, Place
from .base import register_mixer
from .projected import PackedAttention, ProjectedMixer, depthwise_parameters, rename_entries


class FocusedAttention(PackedAttention):
    """Linear attention of the focused power map (eqs. 6 and 7), and a convolution of the values.

    The keys have learned positions, which are bicubically interpolated to the map at hand. All
    heads share the depthwise filters of the convolution; those of a local branch are added to
    them, so that both are one convolution.

    Args:
        place: where the mixer stands.
        power: see `Flatten`.
        head_kernel, local_kernel: see `Flatten`.
    """

    def __init__(self, place: Place, *, power: int, head_kernel: int, local_kernel: int) -> None:
        if local_kernel > head_kernel:
            raise ValueError(
                f"local_kernel is {local_kernel}, above head_kernel = {head_kernel}: the smaller "
                "filters are added to the larger ones"
            )
        super().__init__(place, local_kernel)
        self.power = power
        self.size = (place.size[0], place.size[1])
        # Their ranks are such that weight decay acts on them as in the authors' code.
        self.scale = nn.Parameter(torch.zeros(1, 1, place.dim))
        self.position = nn.Parameter(torch.zeros(*self.size, place.dim))
        self.head_weight, self.head_bias = depthwise_parameters(place, self.head_dim, head_kernel)
        # The filters of all channels, which `fuse()` computes once.
        self.register_buffer("fused_weight", None, persistent=False)
        self.register_buffer("fused_bias", None, persistent=False)

    def extra_repr(self) -> str:
        kernel = self.head_weight.shape[-1]
        return f"{super().extra_repr()}, head_kernel={kernel}, power={self.power}"

    def forward(self, projection: Tensor, context: Context) -> Tensor:
        blocks = projection.unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = blocks.unbind(2)
        y = focused_linear_attention(
            query,
            key + self.positions(context.size).to(key.dtype),
            value,
            self.scale.flatten(),
            power=self.power,
            local=self.convolve(value, context.size, *self.filters()),
        )
        return y.flatten(2)

    def positions(self, size: tuple[int, int]) -> Tensor:
        """The positions (P + H * W, heads, D) of a map's keys, zero at class tokens."""
        with without_autocast(self.position):
            position = resize_position(self.position, size).flatten(0, 1)
        position = F.pad(position, (0, 0, self.prefix_tokens, 0))
        return position.unflatten(-1, (self.num_heads, self.head_dim))

    def filters(self) -> tuple[Tensor, Tensor]:
        """The filters (C, 1, k, k) of all channels, and their bias (C,)."""
        if self.fused_weight is not None and self.fused_bias is not None:
            return self.fused_weight, self.fused_bias
        weight = self.head_weight.repeat(self.num_heads, 1, 1, 1)
        bias = self.head_bias.repeat(self.num_heads)
        if self.local_weight is not None and self.local_bias is not None:
            rim = (weight.shape[-1] - self.local_weight.shape[-1]) // 2
            weight = weight + F.pad(self.local_weight, (rim,) * 4)
            bias = bias + self.local_bias
        return weight, bias

    def fuse(self) -> nn.Module:
        """This operator, with the filters of all channels computed once."""
        with torch.no_grad():
            self.fused_weight, self.fused_bias = self.filters()
        return self


@register_mixer("flatten")
class Flatten(ProjectedMixer):
    """Focused linear attention between projections; see `FocusedAttention`.

    Args:
        place: where the mixer stands.
        power: the power p of the feature map, which sharpens the direction of queries and keys.
        head_kernel: size of the depthwise convolution of the values whose filters all heads
            share, odd.
        local_kernel: size of a further depthwise convolution of the values, with filters of each
            channel's own, odd and at most `head_kernel`; 0 for no such convolution.

    Raises:
        ValueError: if `local_kernel` is larger than `head_kernel`.
    """

    attention: FocusedAttention

    def __init__(
        self, place: Place, *, power: int = 3, head_kernel: int = 5, local_kernel: int = 0
    ) -> None:
        attention = FocusedAttention(
            place, power=power, head_kernel=head_kernel, local_kernel=local_kernel
        )
        super().__init__(place, attention)

    def convert_checkpoint(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' entries, renamed; positions of another image size are interpolated."""
        entries = rename_entries(entries, AUTHORS_NAMES)
        entries = super().convert_checkpoint(entries)
        size, name = self.attention.size, "attention.position"
        if (tokens := entries.pop("positional_encoding", None)) is not None:
            # The authors' maps are square, unless they have this one's number of tokens.
            side = math.isqrt(tokens.shape[1])
            fits = tokens.shape[1] == size[0] * size[1]
            entries[name] = tokens[0].unflatten(0, size if fits else (side, side))
        if (position := entries.get(name)) is not None:
            entries[name] = resize_position(position.float(), size).to(position.dtype)
        return entries


AUTHORS_NAMES = {"scale": "attention.scale", "dwc.": "attention.head_"}


@cache_constants
def interpolation(length: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Bicubic interpolation of `length` values to `target`, as a matrix (target, length).

    The gradient of a product with it is the same in every run; on CUDA, `F.interpolate` sums its
    gradient by atomics.
    """
    identity = torch.eye(length, dtype=dtype, device=device)
    return F.interpolate(identity[None, None], (target, length), mode="bicubic")[0, 0]


def resize_position(position: Tensor, size: tuple[int, int]) -> Tensor:
    """Positions (h, w, C), bicubically interpolated to (H, W, C)."""
    # Comparing sizes would specialise an exported graph, so an export always interpolates.
    if not is_exporting() and tuple(position.shape[:2]) == tuple(size):
        return position
    kind = position.dtype, position.device
    rows, columns = (
        interpolation(*lengths, *kind) for lengths in zip(position.shape[:2], size, strict=True)
    )
    position = (rows @ position.flatten(1)).unflatten(1, (-1, position.shape[2]))
    return columns @ position
