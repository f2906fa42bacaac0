"""Locally-grouped attention of Twins (arXiv:2104.13840, NeurIPS 2021)."""

from timm.layers import is_exporting
from torch import Tensor

from ...kernels.window_attention import window_attention
from ..context import Context, Place
from .base import refuse_prefix_tokens, register_mixer
from .projected import PackedAttention
from .window import PaddedWindows


class GroupedWindowAttention(PackedAttention):
    """softmax(D^-0.5 q k^T) v within windows, which are not shifted and have no position biases.

    Args:
        place: where the mixer stands.
        window_size: side of the windows, in tokens.
    """

    def __init__(self, place: Place, window_size: int) -> None:
        super().__init__(place)
        self.window_size = window_size

    def pads(self, size: tuple[int, int]) -> bool:
        """Whether a map may be padded; an exported graph is always prepared for it."""
        return is_exporting() or any(side % self.window_size for side in size)

    def forward(self, projection: Tensor, context: Context, fill: Tensor | None) -> Tensor:
        """The attention of a projection; `fill` (3 C,), or zeros, stands at padded places."""
        y = window_attention(
            projection.unflatten(1, context.size),
            heads=self.num_heads,
            windows=[(self.window_size, self.window_size)],
            fill=fill,
        )
        return y.flatten(1, 2)


@register_mixer("grouped_window")
class GroupedWindow(PaddedWindows):
    """Attention within windows of a fixed size.

    A map is padded with zeros at the bottom and right, whose q, k and v are what the projection
    makes of them, and which the tokens of their windows see.

    Args:
        place: where the mixer stands.
        window_size: side of the windows, in tokens.

    Raises:
        ValueError: if there are class tokens, which lie in no window.
    """

    def __init__(self, place: Place, *, window_size: int = 7) -> None:
        refuse_prefix_tokens(place, "windows hold the tokens of a map")
        super().__init__(place, GroupedWindowAttention(place, window_size))
