"""Attention within windows that lie side by side, without positions (L2ViT, arXiv:2501.16182)."""

from timm.layers import is_exporting
from torch import Tensor

from ...kernels.window_attention import window_attention
from ..context import Context, Place
from .attention_map import make_attention_drop
from .base import refuse_prefix_tokens, register_mixer
from .projected import PackedAttention
from .window import PaddedWindows


class LocalWindowAttention(PackedAttention):
    """softmax(D^-0.5 q k^T) v within windows.

    Args:
        place: where the mixer stands.
        window_size: side w of the windows, in tokens.
    """

    def __init__(self, place: Place, window_size: int) -> None:
        super().__init__(place)
        self.attn_drop = make_attention_drop()
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
            attn_drop=self.attn_drop,
        )
        return y.flatten(1, 2)


@register_mixer("local_window")
class LocalWindow(PaddedWindows):
    """Attention within windows that are never shifted and have no table of positions.

    A map is padded at its bottom and right with zeros, whose q, k and v are what the projection
    makes of them, and which the other tokens see; a map smaller than a window as well.

    Args:
        place: where the mixer stands.
        window_size: side w of the windows, in tokens.

    Raises:
        ValueError: if there are class tokens, which lie in no window.
    """

    def __init__(self, place: Place, *, window_size: int = 7) -> None:
        refuse_prefix_tokens(place, "windows hold the tokens of a map")
        super().__init__(place, LocalWindowAttention(place, window_size))
