"""What SLAB and PolaFormer share: keys with learned positions, one local branch for all heads."""

import torch
import torch.nn.functional as F
from timm.layers import is_exporting
from torch import Tensor, nn

from ...kernels.runtime.dispatch import without_autocast
from ..checkpoint import resize_position
from ..context import Context, Place
from .projected import PackedAttention, ProjectedMixer, depthwise_parameters


class PositionedAttention(PackedAttention):
    """An operator that adds learned positions to the keys, and convolves the values of each head.

    The positions are those of the map at the model's image size; any other size interpolates them.

    Args:
        place: where the mixer stands.
        local_kernel: size k of the depthwise convolution of the values, odd. Its filters are
            (D, 1, k, k), the same for every head.
    """

    local_weight: Tensor
    local_bias: Tensor

    def __init__(self, place: Place, local_kernel: int) -> None:
        if local_kernel < 1:
            raise ValueError("local_kernel is 0, but this attention always has a local branch")
        super().__init__(place)
        self.size = place.size
        self.local_weight, self.local_bias = depthwise_parameters(
            place, self.head_dim, local_kernel
        )
        self.position = nn.Parameter(torch.zeros(1, place.size[0] * place.size[1], place.dim))

    def key_positions(self, context: Context, like: Tensor) -> Tensor:
        """The positions (1, P + H * W, heads, D) of the keys `like`, zero at class tokens."""
        position = self.position
        # Comparing sizes would specialise an exported graph.
        if is_exporting() or tuple(context.size) != tuple(self.size):
            with without_autocast(position):
                image = position.unflatten(1, self.size).permute(0, 3, 1, 2)
                image = image.to(torch.promote_types(position.dtype, torch.float32))
                image = F.interpolate(image, context.size, mode="bicubic", antialias=True)
                position = image.flatten(2).transpose(1, 2)
        position = F.pad(position.to(like.dtype), (0, 0, self.prefix_tokens, 0))
        return position.unflatten(-1, (self.num_heads, self.head_dim))

    def local_filters(self) -> tuple[Tensor, Tensor]:
        """Weight (C, 1, k, k) and bias (C,) of the local branch; `fuse()` computes them once."""
        copies = self.num_heads * self.head_dim // len(self.local_weight)
        return self.local_weight.repeat(copies, 1, 1, 1), self.local_bias.repeat(copies)

    def fuse(self) -> nn.Module:
        """This operator, which then holds the filters of all channels."""
        with torch.no_grad():
            weight, bias = self.local_filters()
        self.local_weight, self.local_bias = nn.Parameter(weight), nn.Parameter(bias)
        return self


class PositionedMixer(ProjectedMixer):
    """A `PositionedAttention` between projections."""

    attention: PositionedAttention

    def convert_checkpoint(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' entries; positions of another image size are interpolated."""
        entries = {
            name.replace("positional_encoding", "attention.position"): value
            for name, value in super().convert_checkpoint(entries).items()
        }
        if (position := entries.get("attention.position")) is not None:
            entries["attention.position"] = resize_position(position, self.attention.size, 0)
        return entries
