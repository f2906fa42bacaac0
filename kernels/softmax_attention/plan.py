"""The launch decisions of `attention_of_parts`, and the order of its kernels.

The whole is one call of the kernels, the shares are another. A program holds the keys and values of
one head, and goes through a split of the tokens:

    forward     attend      y, written to its channels of the result
    backward    gradient    dq, written to its channels; dk and dv, partial, per split
                finish      dk and dv, summed over the splits in a fixed order

The softmax is recomputed in the backward pass, which has all keys in hand at once: nothing is kept
but the inputs, of which queries and gradients are read once.
"""

from dataclasses import dataclass

import torch

from ..runtime.launch import Launch, Tile, cache_plan, cdiv, pad_size, split_tokens
from . import MOST_KEYS

# By padded head width; chosen by registers and spills in the machine code.
ATTEND = {32: Tile(64, 4, 2, 6, 64), 64: Tile(64, 4, 2, 5, 64), 128: Tile(64, 4, 2, 3, 64)}
GRADIENT = {32: Tile(64, 4, 2, 3, 128), 64: Tile(64, 4, 1, 2, 128), 128: Tile(64, 8, 1, 1, 256)}
# float32 multiplies without tensor cores, and holds its operands in registers.
WIDE = {32: Tile(16, 8, 1, 2, 64), 64: Tile(16, 16, 1, 1, 64), 128: Tile(16, 16, 1, 1, 64)}
# Elements per program that sums over splits.
FINISH = 1024


def choose_tiles(padded: int, itemsize: int) -> tuple[Tile, Tile]:
    """The tiles of the forward and the backward kernel, by head width and bytes of an element."""
    if itemsize == 4:
        return WIDE[padded], WIDE[padded]
    return ATTEND[padded], GRADIENT[padded]


@dataclass(frozen=True)
class Plan:
    """The launches of one call of the kernels.

    Args:
        sums: the shape of what `gradient` leaves, (heads of all images, splits, M, 2 D).
        attend, gradient, finish: the launches.
    """

    sums: tuple[int, int, int, int]
    attend: Launch
    gradient: Launch
    finish: Launch


@cache_plan
def plan(
    query: torch.Size, shares: int, local: torch.Size, dtype: torch.dtype, device: torch.device
) -> Plan:
    """Plan for queries (B, N, C) of some shares, whose values are (B, M, heads, D)."""
    tokens = query[1]
    batch, keys, heads, width = local
    rows = batch * heads * shares
    # Tiles of 16 channels make Triton 3.6 write code for Hopper that races.
    padded = max(32, pad_size(width))
    constants = {"SHARES": shares, "D": width, "P": padded, "KEYS": MOST_KEYS}

    def make(tile: Tile) -> Launch:
        splits, each = split_tokens(tile, rows, tokens, device)
        return Launch(
            (rows, splits),
            (tokens, each, keys, heads, width**-0.5),
            {**constants, "BLOCK": tile.block, "num_warps": tile.warps, "num_stages": tile.stages},
        )

    attend, gradient = (make(tile) for tile in choose_tiles(padded, dtype.itemsize))
    splits, count = gradient.grid[1], keys * 2 * width
    finish = Launch(
        (rows, cdiv(count, FINISH)),
        (splits, keys, heads),
        {"SHARES": shares, "D": width, "BLOCK": FINISH, "num_warps": 4},
    )
    return Plan((rows, splits, keys, 2 * width), attend, gradient, finish)
