"""The launch decisions of `hash_attention`, and the order of its kernels.

    forward     directions      the sum of the queries' directions, which gives the mean distance
                codes           codes, and the sums over tokens of codes and of c^T v
                read            y
    backward    state gradient  the gradients of these sums
                value gradient  dv, and the gradient of the mean distance
                query gradient  dq

A pass over the tokens is split, so that one image fills the device; PyTorch adds the parts, in a
fixed order. The mean over tokens and anchors of the distances is linear in the directions, so that
one pass over the queries gives it.

Codes are kept for the backward pass, a byte for each bit: its sign, plus 4 where the gradient
passes. They, the kernel's values and their gradients are products without tensor cores, as exact as
PyTorch's in float32: a sign decides about all of a token.
"""

from dataclasses import dataclass

import torch

from ..linear_attention.operator import padded_width
from ..runtime.launch import Launch, Tile, cache_plan, split_tokens

# Chosen by registers and spills in the machine code, see docs/performance.md.
DIRECTIONS = Tile(64, 4, 2, 8, 256)
CODES = Tile(32, 4, 2, 4, 256)
READ = Tile(64, 4, 2, 6, 128)
STATE_GRADIENT = Tile(64, 4, 2, 3, 256)
SLOPES = Tile(32, 4, 1, 3, 256)


@dataclass(frozen=True)
class Plan:
    """Launches for one signature, and the shapes of what they leave.

    Args:
        rows: sequences of tokens, B * heads.
        width, bits: of a head and of a code, padded.
        directions, ..., query_gradient: the launches.
    """

    rows: int
    width: int
    bits: int
    directions: Launch
    codes: Launch
    read: Launch
    state_gradient: Launch
    value_gradient: Launch
    query_gradient: Launch

    def parts_of(self, how: Launch, *shape: int) -> tuple[int, ...]:
        """The shape of the parts that the programs of a launch leave."""
        return self.rows, how.grid[1], *shape


@cache_plan
def plan(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, anchors: int, bits: int
) -> Plan:
    """Plan for queries of one shape (B, N, heads, D), some anchors and codes of some bits."""
    batch, tokens, heads, width = shape
    rows = batch * heads
    sizes = {"D": width, "P": padded_width(width)}
    code = {"BITS": bits, "CODE": padded_width(bits)}
    kernel = {"ANCHORS": anchors, "M": padded_width(anchors)}

    def make(tile: Tile, **constants) -> Launch:
        splits, per_split = split_tokens(tile, rows, tokens, device)
        options = {"BLOCK": tile.block, "num_warps": tile.warps, "num_stages": tile.stages}
        return Launch((rows, splits), (tokens, per_split, heads), {**sizes, **constants, **options})

    return Plan(
        rows,
        sizes["P"],
        code["CODE"],
        directions=make(DIRECTIONS),
        codes=make(CODES, **kernel, **code),
        read=make(READ, **code),
        state_gradient=make(STATE_GRADIENT, **code),
        value_gradient=make(SLOPES, **kernel, **code, QUERY=False),
        query_gradient=make(SLOPES, **kernel, **code, QUERY=True),
    )
