"""Attention within shifted windows (Swin; arXiv:2103.14030, ICCV 2021)."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from timm.layers import is_exporting, trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from ...kernels.rotary import Rotary
from ...kernels.window_attention import Padding, window_attention
from .place import Place
from .projected import ProjectedMixer


@register_notrace_module
class Window(ProjectedMixer):
    """softmax(D^-0.5 q k^T + B) v within windows, which every odd block of a stage shifts by half.

    The bias B is a function of the relative position (eq. 4), so rotary tables are not used. A
    map is padded with zeros, whose q, k and v are the projection's bias. Along a side on which the
    map is no larger than a window, the window is the map and nothing is shifted.

    Args:
        place: where the mixer stands.
        window_size: side w of the windows, in tokens.
        padding: 'end' pads a map before it is shifted, as Microsoft's code for detection does,
            'end_after_shift' after it, as timm does. They agree on multiples of w.

    Raises:
        ValueError: if there are class tokens, which lie in no window.
    """

    def __init__(self, place: Place, *, window_size: int = 7, padding: Padding = "end") -> None:
        if place.prefix_tokens:
            raise ValueError(
                f"windows hold the tokens of a map, but {place.prefix_tokens} class tokens stand "
                "before it: take another mixer, or a skeleton without class tokens"
            )
        super().__init__(place)
        self.window_size = window_size
        self.padding = padding
        self.shift_size = window_size // 2 if place.block % 2 else 0
        offsets = (2 * window_size - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, place.num_heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """The table, which is a matrix but no weight."""
        return {"relative_position_bias_table"}

    @staticmethod
    def fit_tables(
        state_dict: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
    ) -> dict[str, Tensor]:
        """The tables of another window interpolated."""
        return {
            name: resize_position_bias(value, shapes[name][0])
            if name.endswith("relative_position_bias_table") and name in shapes
            else value
            for name, value in state_dict.items()
        }

    def attend(self, projection: Tensor, size: tuple[int, int], rotary: Rotary | None) -> Tensor:
        side = 2 * self.window_size - 1
        windows = tuple(min(self.window_size, length) for length in size)
        # A question for the sizes would fix an exported graph's.
        padded = is_exporting() or any(s % w for s, w in zip(size, windows, strict=True))
        y = window_attention(
            projection.unflatten(1, size),
            heads=self.num_heads,
            windows=[windows],
            shift=tuple(self.shift_size if self.window_size < length else 0 for length in size),
            padding=self.padding,
            table=self.relative_position_bias_table.view(side, side, self.num_heads),
            fill=self.in_proj.bias if padded else None,
        )
        return y.flatten(1, 2)


def resize_position_bias(table: Tensor, offsets: int) -> Tensor:
    """A table (w^2, heads) of relative positions for as many offsets, by bicubic interpolation."""
    old, new = math.isqrt(table.shape[0]), math.isqrt(offsets)
    if old == new:
        return table
    maps = table.t().reshape(1, -1, old, old)
    maps = F.interpolate(maps, size=(new, new), mode="bicubic", align_corners=False)
    return maps.flatten(2)[0].t().contiguous()
