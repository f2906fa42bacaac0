"""Simplified linear attention (SLAB; arXiv:2405.11582, ICML 2024)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear_attention import linear_attention
from ..context import Context, Place
from ..unused import depend_on
from .base import register_mixer
from .positioned import PositionedAttention, PositionedMixer
from .projected import depthwise_parameters, rename_entries


class SimplifiedAttention(PositionedAttention):
    """relu(q) (sum_j relu(k_j + p_j)^T v_j) / (relu(q) . sum_j relu(k_j + p_j)) + conv(v).

    Args:
        place: where the mixer stands.
        local_kernel: see `PositionedAttention`.
        channel_kernel: size, odd and no larger, of a second convolution of the values, with a
            filter of its own for each channel; 0 for no such convolution. With it, the operator
            holds the `scale` of its authors' code, which no output depends on.
    """

    def __init__(self, place: Place, local_kernel: int, channel_kernel: int) -> None:
        if channel_kernel > local_kernel:
            raise ValueError(
                f"channel_kernel is {channel_kernel}, expected at most local_kernel = "
                f"{local_kernel}, with whose filters it is joined"
            )
        super().__init__(place, local_kernel)
        self.channel_weight = self.channel_bias = self.scale = None
        if channel_kernel:
            self.channel_weight, self.channel_bias = depthwise_parameters(
                place, place.dim, channel_kernel
            )
            self.scale = nn.Parameter(torch.zeros(1, 1, place.dim))

    def forward(self, projection: Tensor, context: Context) -> Tensor:
        blocks = projection.unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = blocks.unbind(2)
        return linear_attention(
            query,
            key + self.key_positions(context, key),
            value,
            feature_map="relu",
            readout="summed",
            local=self.local_branch(value, context.size),
        ).flatten(2)

    def local_filters(self) -> tuple[Tensor, Tensor]:
        weight, bias = super().local_filters()
        if self.channel_weight is None or self.channel_bias is None or self.scale is None:
            return weight, bias
        # A sum of convolutions is the convolution with the sum of their filters.
        border = (weight.shape[-1] - self.channel_weight.shape[-1]) // 2
        weight = weight + F.pad(self.channel_weight, (border,) * 4)
        return weight, depend_on(bias + self.channel_bias, self.scale.flatten())

    def fuse(self) -> nn.Module:
        super().fuse()
        self.channel_weight = self.channel_bias = self.scale = None
        return self


@register_mixer("slab")
class Simplified(PositionedMixer):
    """Linear attention of rectified queries and keys, between projections.

    See `SimplifiedAttention`: to the keys positions are added, to the result a convolution of
    the values.

    Args:
        place: where the mixer stands.
        local_kernel: size of the depthwise convolution of the values, odd, whose filters all
            heads share.
        channel_kernel: size of a second one, odd, with filters of its own for each channel, as in
            the authors' CSwin; 0 for no such convolution.

    Raises:
        ValueError: if there is no local branch, or `channel_kernel` is larger.
    """

    def __init__(self, place: Place, *, local_kernel: int = 5, channel_kernel: int = 0) -> None:
        super().__init__(place, SimplifiedAttention(place, local_kernel, channel_kernel))

    def convert_checkpoint(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' entries, of which `get_v` is the second convolution."""
        names = {"get_v.": "attention.channel_", "scale": "attention.scale"}
        return super().convert_checkpoint(rename_entries(entries, names))
