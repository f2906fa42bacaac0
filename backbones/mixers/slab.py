"""Simplified linear attention (SLAB; arXiv:2405.11582, ICML 2024)."""

import torch
from torch import Tensor, nn

from ...kernels.linear_attention import linear_attention
from ..context import Context, Place
from ..unused import depend_on
from .base import register_mixer
from .positioned import PositionedAttention, PositionedMixer


class SimplifiedAttention(PositionedAttention):
    """relu(q) (sum_j relu(k_j + p_j)^T v_j) / (relu(q) . sum_j relu(k_j + p_j)) + conv(v).

    With a `channel_kernel` the operator holds the `scale` of its authors' code, which no output
    depends on.

    Args:
        place: where the mixer stands.
        local_kernel, channel_kernel: see `PositionedAttention`.
    """

    def __init__(self, place: Place, local_kernel: int, channel_kernel: int) -> None:
        super().__init__(place, local_kernel, channel_kernel)
        self.scale = nn.Parameter(torch.zeros(1, 1, place.dim)) if channel_kernel else None

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
        return weight, bias if self.scale is None else depend_on(bias, self.scale.flatten())

    def fuse(self) -> nn.Module:
        super().fuse()
        self.scale = None
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
