"""What FLatten, SLAB and PolaFormer share: positions of the keys, filters that all heads share."""

import math

import torch
import torch.nn.functional as F
from timm.layers import is_exporting
from torch import Tensor, nn

from ...kernels.runtime.dispatch import cache_constants, without_autocast
from ..context import Context, Place
from ..resampling import resampling
from .projected import PackedAttention, ProjectedMixer, depthwise_parameters, rename_entries


class PositionedAttention(PackedAttention):
    """An operator that adds learned positions to the keys, and convolves the values of each head.

    The positions are those of the map at the model's image size; any other size interpolates them.

    Args:
        place: where the mixer stands.
        local_kernel: size k of the depthwise convolution of the values, odd. Its filters are
            (D, 1, k, k), the same for every head.
        channel_kernel: size, odd and no larger, of a second convolution of the values, with a
            filter of its own for each channel; 0 for no such convolution.

    Raises:
        ValueError: if there is no local branch, or `channel_kernel` is larger.
    """

    local_weight: Tensor
    local_bias: Tensor

    def __init__(self, place: Place, local_kernel: int, channel_kernel: int = 0) -> None:
        if local_kernel < 1:
            raise ValueError("local_kernel is 0, but this attention always has a local branch")
        if channel_kernel > local_kernel:
            raise ValueError(
                f"channel_kernel is {channel_kernel}, expected at most local_kernel = "
                f"{local_kernel}, with whose filters it is joined"
            )
        super().__init__(place)
        self.local_weight, self.local_bias = depthwise_parameters(
            place, self.head_dim, local_kernel
        )
        self.channel_weight = self.channel_bias = None
        if channel_kernel:
            self.channel_weight, self.channel_bias = depthwise_parameters(
                place, place.dim, channel_kernel
            )
        self.position = nn.Parameter(torch.zeros(*place.size, place.dim))

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the map at the model's image size."""
        return self.position.shape[0], self.position.shape[1]

    def key_positions(self, context: Context, like: Tensor) -> Tensor:
        """The positions (P + H * W, heads, D) of the keys `like`, zero at class tokens."""
        with without_autocast(self.position):
            position = resize_positions(self.position, context.size).flatten(0, 1)
        if self.prefix_tokens:
            position = F.pad(position, (0, 0, self.prefix_tokens, 0))
        return position.to(like.dtype).unflatten(-1, (self.num_heads, self.head_dim))

    def local_filters(self) -> tuple[Tensor, Tensor]:
        """Weight (C, 1, k, k) and bias (C,) of the local branch; `fuse()` computes them once."""
        copies = self.num_heads * self.head_dim // len(self.local_weight)
        weight, bias = self.local_weight.repeat(copies, 1, 1, 1), self.local_bias.repeat(copies)
        if self.channel_weight is None or self.channel_bias is None:
            return weight, bias
        # A sum of convolutions is the convolution with the sum of their filters.
        border = (weight.shape[-1] - self.channel_weight.shape[-1]) // 2
        return weight + F.pad(self.channel_weight, (border,) * 4), bias + self.channel_bias

    def fuse(self) -> nn.Module:
        """This operator, which then holds the filters of all channels."""
        with torch.no_grad():
            weight, bias = self.local_filters()
        self.local_weight, self.local_bias = nn.Parameter(weight), nn.Parameter(bias)
        self.channel_weight = self.channel_bias = None
        return self


class PositionedMixer(ProjectedMixer):
    """A `PositionedAttention` between projections."""

    attention: PositionedAttention

    def convert_checkpoint(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' entries; positions of another image size are interpolated."""
        names = {"get_v.": "attention.channel_", "scale": "attention.scale"}
        entries = super().convert_checkpoint(rename_entries(entries, names))
        size, name = self.attention.size, "attention.position"
        if (tokens := entries.pop("positional_encoding", None)) is not None:
            # The authors' maps are square, unless they have this one's number of tokens.
            side = math.isqrt(tokens.shape[1])
            fits = tokens.shape[1] == size[0] * size[1]
            entries[name] = tokens[0].unflatten(0, size if fits else (side, side))
        if (position := entries.get(name)) is not None:
            entries[name] = resize_positions(position, size).to(position.dtype)
        return entries

    def resize_tables(self, size: tuple[int, int]) -> dict[str, Tensor]:
        """The positions of the keys."""
        return {"attention.position": resize_positions(self.attention.position, size)}


@cache_constants
def interpolation(length: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Bicubic interpolation of `length` values to `target`, as a matrix (target, length).

    The gradient of a product with it is the same in every run; on CUDA, `F.interpolate` sums its
    gradient by atomics.
    """
    if is_exporting():
        return resampling(length, target, "bicubic", False, dtype, device)
    identity = torch.eye(length, dtype=dtype, device=device)
    return F.interpolate(identity[None, None], (target, length), mode="bicubic")[0, 0]


def resize_positions(position: Tensor, size: tuple[int, int]) -> Tensor:
    """Positions (h, w, C), bicubically interpolated to (H, W, C) in float32 or wider."""
    # Comparing sizes would specialise an exported graph, so an export always interpolates.
    if not is_exporting() and tuple(position.shape[:2]) == tuple(size):
        return position
    position = position.to(torch.promote_types(position.dtype, torch.float32))
    kind = position.dtype, position.device
    rows, columns = (
        interpolation(*lengths, *kind) for lengths in zip(position.shape[:2], size, strict=True)
    )
    position = (rows @ position.flatten(1)).unflatten(1, (-1, position.shape[2]))
    return columns @ position
