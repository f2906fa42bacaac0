"""The launch decisions of `mixed_state_attention`, and the order of its kernels.

A state per square, of D x D floats, outweighs the tokens of the square unless they are several
times D; written, mixed and read again the states would be most of the bytes. So on maps of few
tokens (`PAIRS_PER_STATE_ROW`, __init__.py) the products are taken pair by pair: f = phi(q),
g = phi(k),

    y_q = sum over all tokens k of A_ij (f_q . g_k) v_k / (z_q + 1e-6)        q in i, k in j

in tiles that never leave the registers. A tile finds the A of its pairs by a product with ones and
zeros that say in which square a token lies:

    forward     sum_keys          n, phi(k) summed by square
                attend            the result, from a tile of queries at the same places of all
                                  squares, whose normalisers mix within the tile
    backward    query gradient    dq, part by part dA, and two factors per query for the keys
                key gradient      dk, dv

On larger maps the states are made, and a program goes through one square of one head:

    forward     sum_states            S and n
                normalise             1 / (z + 1e-6), of all squares at the same places
                mix_states            the mixed states A S
                read                  the result
    backward    sum_states            the gradient of A S, of queries and the result's gradient
                mix_states            dS, and part by part the dA that comes by the states
                mix_states            A S again
                differentiate read    dz
                mix_slopes            from dz, of all squares at the same places, the gradient of
                                      each query's product with n, and the dA that comes by z
                differentiate read    dq and dn
                differentiate states  dk, dv

Nothing of size N D is stored besides inputs and outputs, and every sum has a fixed order.
"""

from dataclasses import dataclass
from math import isqrt

import torch

from ..linear_attention.plan import REGISTERS
from ..runtime.launch import Launch, cache_plan, cdiv, pad_size
from .operator import padded_head


@dataclass(frozen=True)
class Tile:
    """How a kernel that goes through pairs of tokens runs.

    Args:
        block: tokens that a program owns.
        step: tokens of the other side that it meets at a time.
        warps: warps per program.
        stages: stages of the software pipeline.
        resident: programs that a multiprocessor holds at once.
    """

    block: int
    step: int
    warps: int
    stages: int
    resident: int


# By kernel, for 16-bit inputs and heads up to 64 and up to 128 wide; chosen by registers and
# spills in the machine code, see docs/performance.md.
TILES = {
    "attend": {64: Tile(64, 64, 4, 2, 3), 128: Tile(64, 64, 8, 2, 1)},
    "query_gradient": {64: Tile(64, 64, 4, 2, 2), 128: Tile(32, 64, 8, 1, 1)},
    "key_gradient": {64: Tile(64, 64, 4, 2, 2), 128: Tile(32, 64, 8, 1, 1)},
}
# float32 multiplies without tensor cores, and holds its operands in registers.
WIDE_TILES = {64: Tile(64, 16, 8, 1, 1), 128: Tile(16, 16, 8, 1, 1)}
# Of the kernels that hold a state: tokens at a time, warps and stages.
STATE_TILES = {64: (64, 4, 2), 128: (64, 8, 1)}
WIDE_STATE_TILES = {64: (32, 8, 1), 128: (16, 16, 1)}
# Tokens at a time, and warps, of the kernel that sums the keys of a square.
SUM_BLOCK, SUM_WARPS = 16, 1
# Elements of all states that a program mixes, and of each state in a product of two.
MIXED_ELEMENTS, PRODUCT_ELEMENTS = 4096, 32


def choose_tile(kernel: str, padded: int, itemsize: int) -> Tile:
    """The tile of a kernel by the padded width of a head and the bytes of an input."""
    width = 64 if padded <= 64 else 128
    return WIDE_TILES[width] if itemsize == 4 else TILES[kernel][width]


def choose_state_tile(padded: int, itemsize: int) -> tuple[int, int, int]:
    """Tokens at a time, warps and stages of the kernels that hold a state."""
    return (WIDE_STATE_TILES if itemsize == 4 else STATE_TILES)[64 if padded <= 64 else 128]


def fold_rows(block: int, warps: int, row_bytes: int) -> int:
    """The rows of a block that its warps load at once, 16 bytes per thread."""
    return min(block, max(1, warps * 512 // row_bytes))


def reciprocal(divisor: int) -> int:
    """n // divisor = n * reciprocal >> 30, exactly, while n * divisor < 2^30.

    A map without tokens has a divisor of 0, by which nothing is divided.
    """
    return -(-(1 << 30) // max(divisor, 1))


@dataclass(frozen=True)
class Plan:
    """Sizes and launches by pairs of tokens, for one signature.

    Args:
        factors: the shape of what the query gradient leaves for the key gradient.
        parts: the shape of the parts of the mixing's gradient.
        sum_keys, ..., key_gradient: the launches.
    """

    factors: tuple[int, int, int]
    parts: tuple[int, int, int]
    sum_keys: Launch
    attend: Launch
    query_gradient: Launch
    key_gradient: Launch


@dataclass(frozen=True)
class StatePlan:
    """Sizes and launches by states, for one signature.

    Args:
        parts: the shapes of the parts of the mixing's gradient, by the states and by z.
        sum_states, ..., differentiate_states: the launches.
    """

    parts: tuple[tuple[int, int, int], tuple[int, int, int]]
    sum_states: Launch
    normalise: Launch
    mix_states: Launch
    read: Launch
    sum_gradients: Launch
    mix_gradients: Launch
    measure: Launch
    mix_slopes: Launch
    differentiate_read: Launch
    differentiate_states: Launch


@cache_plan
def plan(
    shape: torch.Size, dtype: torch.dtype, size: tuple[int, int], squares: int, local: bool
) -> Plan:
    """Plan for queries of one shape (B, N, heads, D).

    Args:
        shape, dtype: of the queries.
        size: (H, W).
        squares: M, the squares of the map.
        local: whether there is a local branch.
    """
    batch, tokens, heads, head_width = shape
    height, width = size
    side, bh = isqrt(squares), batch * heads
    rows, columns = cdiv(height, side), cdiv(width, side)
    padded, lanes = padded_head(head_width), pad_size(squares)
    constants = {"D": head_width, "P": padded, "SQUARES": side}
    reciprocals = tuple(map(reciprocal, (width, rows, columns)))
    map_sizes = (height, width, rows, columns)

    def make(kernel: str, sizes: tuple, **flags: bool) -> Launch:
        tile = choose_tile(kernel, padded, dtype.itemsize)
        block = tile.block
        tiles = cdiv(tokens, block)
        if kernel != "key_gradient":  # whose tiles need not have all squares
            block = max(block, lanes)
            tiles = cdiv(rows * columns, block // lanes)
        tile_constants = {
            **constants, "LANES": lanes, "BLOCK": block, "STEP": tile.step, **flags,
            "num_warps": tile.warps, "num_stages": tile.stages,
            "maxnreg": min(255, REGISTERS // (tile.resident * tile.warps * 32) // 8 * 8),
        }  # fmt: skip
        return Launch((bh * tiles,), (tokens, heads, *sizes, *reciprocals, tiles), tile_constants)

    query_gradient = make("query_gradient", map_sizes)
    fold = fold_rows(SUM_BLOCK, SUM_WARPS, padded * dtype.itemsize)
    return Plan(
        factors=(bh, 2, tokens),
        parts=(query_gradient.grid[0], lanes, lanes),
        sum_keys=Launch(
            (bh * squares,),
            (heads, *map_sizes, reciprocals[-1]),
            {**constants, "BLOCK": SUM_BLOCK, "FOLD": fold, "num_warps": SUM_WARPS},
        ),
        attend=make("attend", map_sizes, LOCAL=local),
        query_gradient=query_gradient,
        key_gradient=make("key_gradient", (width,)),
    )


@cache_plan
def plan_states(
    shape: torch.Size, dtype: torch.dtype, size: tuple[int, int], squares: int, local: bool
) -> StatePlan:
    """As `plan`, of the kernels by states."""
    batch, tokens, heads, head_width = shape
    height, width = size
    side, bh = isqrt(squares), batch * heads
    rows, columns = cdiv(height, side), cdiv(width, side)
    padded, lanes = padded_head(head_width), pad_size(squares)
    sizes = (heads, height, width, rows, columns, reciprocal(columns))
    block, warps, stages = choose_state_tile(padded, dtype.itemsize)
    constants = {
        "D": head_width, "P": padded, "SQUARES": side,
        "BLOCK": block, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
    fold = {"FOLD": fold_rows(block, warps, padded * dtype.itemsize)}

    def by_square(*counts: int, **more: int) -> Launch:
        return Launch((bh * squares,), (*counts, *sizes), {**constants, **more})

    places = max(choose_tile("attend", padded, dtype.itemsize).block // lanes, 1)
    tiles = cdiv(rows * columns, places)

    def by_place() -> Launch:
        more = {"LANES": lanes, "BLOCK": places * lanes}
        return Launch((bh * tiles,), (tokens, *sizes, tiles), {**constants, **more})

    chunk = min(MIXED_ELEMENTS // lanes, padded**2)
    chunks = padded**2 // chunk

    def mix(gradient: bool) -> Launch:
        more = {
            "P": padded, "M": squares, "LANES": lanes, "CHUNK": chunk,
            "STEP": min(chunk, PRODUCT_ELEMENTS) if gradient else chunk, "GRADIENT": gradient,
            "num_warps": 4,
        }  # fmt: skip
        strides = (1, squares) if gradient else (squares, 1)
        return Launch((bh * chunks,), (chunks, *strides), more)

    return StatePlan(
        parts=((bh * chunks, lanes, lanes), (bh * tiles, lanes, lanes)),
        sum_states=by_square(tokens, **fold, GRADIENT=False),
        normalise=by_place(),
        mix_states=mix(gradient=False),
        read=by_square(tokens, LOCAL=local),
        sum_gradients=by_square(tokens, **fold, GRADIENT=True),
        mix_gradients=mix(gradient=True),
        measure=by_square(tokens, **fold, MEASURE=True),
        mix_slopes=by_place(),
        differentiate_read=by_square(tokens, **fold, MEASURE=False),
        differentiate_states=by_square(),
    )
