"""Focused linear attention (FLatten Transformer; arXiv:2308.00442, ICCV 2023)."""

import torch
from torch import Tensor, nn

from ...kernels.focused_linear_attention import focused_linear_attention
from ..context import Context, Place
from .base import register_mixer
from .positioned import PositionedAttention, PositionedMixer


class FocusedAttention(PositionedAttention):
    """Linear attention of the focused power map (eqs. 6 and 7), and a convolution of the values.

    Args:
        place: where the mixer stands.
        power: see `Flatten`.
        local_kernel, channel_kernel: see `PositionedAttention`.
    """

    def __init__(self, place: Place, *, power: int, local_kernel: int, channel_kernel: int) -> None:
        super().__init__(place, local_kernel, channel_kernel)
        self.power = power
        # Its rank is such that weight decay acts on it as in the authors' code.
        self.scale = nn.Parameter(torch.zeros(1, 1, place.dim))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, power={self.power}"

    def forward(self, projection: Tensor, context: Context) -> Tensor:
        blocks = projection.unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = blocks.unbind(2)
        return focused_linear_attention(
            query,
            key + self.key_positions(context, key),
            value,
            self.scale.flatten(),
            power=self.power,
            local=self.local_branch(value, context.size),
        ).flatten(2)


@register_mixer("flatten")
class Flatten(PositionedMixer):
    """Focused linear attention between projections; see `FocusedAttention`.

    Args:
        place: where the mixer stands.
        power: the power p of the feature map, which sharpens the direction of queries and keys.
        local_kernel: size of the depthwise convolution of the values, odd, whose filters all
            heads share.
        channel_kernel: size of a second one, odd, with filters of its own for each channel, as in
            the authors' CSwin; 0 for no such convolution.

    Raises:
        ValueError: if there is no local branch, or `channel_kernel` is larger.
    """

    def __init__(
        self, place: Place, *, power: int = 3, local_kernel: int = 5, channel_kernel: int = 0
    ) -> None:
        attention = FocusedAttention(
            place, power=power, local_kernel=local_kernel, channel_kernel=channel_kernel
        )
        super().__init__(place, attention)
