"""The launch decisions of `window_pool`.

An average's program gathers the S entries of its run of the table, and a token's gradient is
gathered, too: along an axis, the map's reflections lie behind one another as the pieces of a folded
strip. In each piece a token has one place, which belongs to one square and may be a step of its
window, and an entry of the table belongs to one average. Nothing is added atomically, and every sum
has a fixed order.
"""

from dataclasses import dataclass

import torch
import triton

from ..runtime.launch import Launch, cache_plan, cdiv

# Elements of a tile, forward and backward, chosen by registers and spills in the machine code; and
# the most entries of a run that are summed in one step.
POOLED, SPREAD, RUN = 1024, 512, 16
WARPS = 4


@dataclass(frozen=True)
class Share:
    """The launches of one share of the channels.

    Args:
        channels: which channels of the map.
        pool, spread: forward and backward.
    """

    channels: slice
    pool: Launch
    spread: Launch


@cache_plan
def plan(
    shape: torch.Size, device: torch.device, heads: int, window: int, dilations: tuple[int, ...]
) -> tuple[Share, ...]:
    """Plan for maps of one shape (B, H, W, C), on a device."""
    batch, height, width, channels = shape
    each = channels // len(dilations)
    depth = each // heads

    def make(number: int, dilation: int) -> Share:
        extent = dilation * (window - 1) + 1
        down, across = (-(-side // extent) for side in (height, width))
        squares, rows = down * across, window**2 * each
        sizes = (height, width, down, across, extent, dilation, window, heads)
        run = min(RUN, triton.next_power_of_2(squares))
        pieces = count_pieces(height, extent * down), count_pieces(width, extent * across)
        pool = Launch(
            (cdiv(rows, POOLED // run), batch),
            (*sizes, rows),
            {
                "D": depth, "ROWS": POOLED // run, "RUN": run, "FOLDED": max(pieces) > 2,
                "num_warps": WARPS,
            },
        )  # fmt: skip
        padded = triton.next_power_of_2(depth)
        tokens = max(1, SPREAD // max(32, padded))
        spread = Launch(
            (cdiv(height * width, tokens), heads, batch),
            (*sizes, *pieces),
            {"D": depth, "P": padded, "TOKENS": tokens, "num_warps": WARPS},
        )
        return Share(slice(number * each, (number + 1) * each), pool, spread)

    return tuple(make(number, dilation) for number, dilation in enumerate(dilations))


def count_pieces(side: int, length: int) -> int:
    """How many pieces of side - 1 steps each, folded, a strip of some tokens has."""
    return max(1, -(-(length - 1) // (side - 1))) if side > 1 else length
