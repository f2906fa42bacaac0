"""Attention within shifted windows (Swin; arXiv:2103.14030, ICCV 2021)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import is_exporting, trunc_normal_
from torch import Tensor, nn

from ...kernels.window_attention import Padding, window_attention
from ..context import Context, Place
from ..linear import is_linear
from .attention_map import make_attention_drop
from .base import refuse_prefix_tokens, register_mixer
from .projected import PackedAttention, ProjectedMixer

TABLE = "relative_position_bias_table"


class WindowAttention(PackedAttention):
    """softmax(D^-0.5 q k^T + B) v within windows, B a table of relative positions (eq. 4).

    Args:
        place: where the mixer stands.
        window_size: side w of the windows, in tokens.
        padding: see `Window`.
    """

    def __init__(self, place: Place, window_size: int, padding: Padding) -> None:
        super().__init__(place)
        self.attn_drop = make_attention_drop()
        self.window_size = window_size
        self.padding: Padding = padding
        self.shifted = bool(place.block % 2)
        # By how many tokens windows are shifted on maps that are larger than a window.
        self.shift_size = window_size // 2 if self.shifted else 0
        offsets = (2 * window_size - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, place.num_heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def windows(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the windows, which are no larger than the map."""
        return min(self.window_size, size[0]), min(self.window_size, size[1])

    def pads(self, size: tuple[int, int]) -> bool:
        """Whether a map may be padded; an exported graph is always prepared for it."""
        windows = self.windows(size)
        return is_exporting() or any(s % w for s, w in zip(size, windows, strict=True))

    def forward(self, projection: Tensor, context: Context, fill: Tensor | None) -> Tensor:
        """The attention of a projection; `fill` (3 C,), or zeros, stands at padded places."""
        side = 2 * self.window_size - 1
        size = context.size
        shift_rows, shift_columns = (
            self.shift_size if self.window_size < length else 0 for length in size
        )
        y = window_attention(
            projection.unflatten(1, size),
            heads=self.num_heads,
            windows=[self.windows(size)],
            shift=(shift_rows, shift_columns),
            padding=self.padding,
            table=self.relative_position_bias_table.view(side, side, self.num_heads),
            fill=fill,
            attn_drop=self.attn_drop,
        )
        return y.flatten(1, 2)


class PaddedWindows(ProjectedMixer):
    """Attention within windows between projections, where a map is padded before it is projected.

    Args:
        place: where the mixer stands.
        attention: as in `ProjectedMixer`; it says by `pads(size)` whether a map may be padded, and
            takes what stands at padded places.
    """

    attention: Any

    def __init__(self, place: Place, attention: nn.Module) -> None:
        super().__init__(place, attention)
        # The projection of zeros after the norm, if `absorb_norm` has changed the projection.
        self.register_buffer("fused_fill", None)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if not self.attention.pads(context.size):
            return self.out_proj(self.attention(self.in_proj(x), context, None))
        if is_linear(self.in_proj) or self.fused_fill is not None:
            fill = self.in_proj.bias if self.fused_fill is None else self.fused_fill
            return self.out_proj(self.attention(self.in_proj(x), context, fill))
        # A module that has taken the layer's place projects a token of zeros besides.
        projection = self.in_proj(F.pad(x, (0, 0, 0, 1)))
        projection, fill = projection[:, :-1], projection[0, -1]
        return self.out_proj(self.attention(projection, context, fill))

    def absorb_norm(self, norm: nn.Module) -> nn.Module:
        fill = self.in_proj.bias if is_linear(self.in_proj) else None
        fill = None if fill is None else fill.detach().clone()
        absorbed = super().absorb_norm(norm)
        if absorbed is not norm:
            self.fused_fill = fill
        return absorbed

    def set_window_size(self, window_size: int) -> None:
        """Attend within windows of another side, in tokens."""
        self.attention.window_size = window_size


@register_mixer("window")
class Window(PaddedWindows):
    """Attention within windows, which each odd block of a stage shifts by half a window.

    A map is padded with zeros, whose q, k and v are what the projection makes of them. Along a
    side on which the map is no larger than a window, the window is the map and nothing is shifted.

    Args:
        place: where the mixer stands.
        window_size: side w of the windows, in tokens.
        padding: 'end' pads a map before it is shifted, as Microsoft's code for detection does,
            'end_after_shift' afterwards, as timm does. They agree on multiples of w.

    Raises:
        ValueError: if there are class tokens, which lie in no window.
    """

    attention: WindowAttention

    def __init__(self, place: Place, *, window_size: int = 7, padding: Padding = "end") -> None:
        refuse_prefix_tokens(place, "windows hold the tokens of a map")
        super().__init__(place, WindowAttention(place, window_size, padding))

    def no_weight_decay(self) -> set[str]:
        """The table, which is a matrix but does not multiply tokens."""
        return {f"attention.{TABLE}"}

    def convert_checkpoint(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """Entries without the buffers of Microsoft's code; another window's table, interpolated."""
        entries = super().convert_checkpoint(entries)
        for buffer in ("relative_position_index", "attn_mask"):
            entries.pop(buffer, None)
        if TABLE in entries:
            entries[f"attention.{TABLE}"] = entries.pop(TABLE)
        if (table := entries.get(f"attention.{TABLE}")) is not None:
            offsets = len(self.attention.relative_position_bias_table)
            entries[f"attention.{TABLE}"] = resize_position_bias(table, offsets)
        return entries

    def set_window_size(self, window_size: int) -> None:
        """Attend within windows of another side, in tokens; the table is interpolated to it."""
        super().set_window_size(window_size)
        self.attention.shift_size = window_size // 2 if self.attention.shifted else 0
        table = self.attention.relative_position_bias_table
        resized = resize_position_bias(table.detach(), (2 * window_size - 1) ** 2)
        self.attention.relative_position_bias_table = nn.Parameter(resized, table.requires_grad)


def resize_position_bias(table: Tensor, offsets: int) -> Tensor:
    """A table (w^2, heads) of relative positions, bicubically interpolated to `offsets` rows."""
    old, new = math.isqrt(table.shape[0]), math.isqrt(offsets)
    if old == new:
        return table
    maps = table.t().reshape(1, -1, old, old)
    maps = F.interpolate(maps, size=(new, new), mode="bicubic", align_corners=False)
    return maps.flatten(2)[0].t().contiguous()
