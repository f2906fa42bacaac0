"""The forward kernels of `mixed_state_attention` by pairs of tokens; see `plan.py`."""

import triton
import triton.language as tl
from torch import Tensor

from ..linear_attention.forward import or_else, strides_of
from ..runtime.launch import launch
from ..runtime.mathematics import fold, operand
from .mathematics import (
    EPSILON,
    SCALARS,
    accumulate,
    feature,
    feature_where,
    load_mixing,
    mix,
    one_hot,
    square_of,
    token_of,
    weights_of,
)
from .plan import Plan


@triton.jit(do_not_specialize=SCALARS)
def _sum_keys(
    k, sums, k_b, k_n, k_h,
    heads, height, width, rows, columns, by_columns,
    D: tl.constexpr, P: tl.constexpr, SQUARES: tl.constexpr, BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """The sum of phi(k) over one square of one head."""
    M: tl.constexpr = SQUARES * SQUARES
    bh = tl.program_id(0) // M
    square = tl.program_id(0) % M
    k += (bh // heads).to(tl.int64) * k_b + (bh % heads) * k_h
    d = tl.arange(0, P)[None, :]
    total = tl.zeros((FOLD, P), tl.float32)
    for start in range(0, rows * columns, BLOCK):
        place = start + tl.arange(0, BLOCK)
        n, here = token_of(square, place, height, width, rows, columns, by_columns, SQUARES)
        ok = here[:, None] & (d < D)
        x = tl.load(k + n.to(tl.int64)[:, None] * k_n + d, mask=ok, other=0.0)
        total += fold(feature_where(x, ok).to(tl.float32), FOLD)
    at = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    tl.store(sums + at, tl.sum(total, 0))


@triton.jit
def load_queries(
    q, sums, mixing, q_n, bh, tile, height, width, rows, columns, by_columns,
    D: tl.constexpr, P: tl.constexpr, SQUARES: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of the queries of all squares at some places: their squares, tokens, which are there,
    the queries, phi of them, the sums of phi(k) in their squares, and the products of both."""
    M: tl.constexpr = SQUARES * SQUARES
    lane = tl.arange(0, BLOCK)
    square = lane % LANES
    place = tile * (BLOCK // LANES) + lane // LANES
    n, here = token_of(square, place, height, width, rows, columns, by_columns, SQUARES)
    d = tl.arange(0, P)[None, :]
    ok = here[:, None] & (d < D)
    x = tl.load(q + n.to(tl.int64)[:, None] * q_n + d, mask=ok, other=0.0)
    f = feature_where(x, ok)
    row = bh.to(tl.int64) * M + square
    total = tl.load(sums + row[:, None] * P + d, mask=(square < M)[:, None], other=0.0)
    return square, n, here, x, f, total, tl.sum(f.to(tl.float32) * total, 1)


@triton.jit(do_not_specialize=SCALARS)
def _attend(
    q, k, v, mixing, local, sums, out,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, l_b, l_n, l_h, o_b, o_n, o_h,
    tokens, heads, height, width, rows, columns, by_width, by_rows, by_columns, tiles,
    D: tl.constexpr, P: tl.constexpr, SQUARES: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    EXACT: tl.constexpr = out.dtype.element_ty == tl.float32
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    square, n, here, _, f, _, product = load_queries(
        q + b * q_b + h * q_h, sums, mixing, q_n, bh, tile,
        height, width, rows, columns, by_columns, D, P, SQUARES, LANES, BLOCK,
    )  # fmt: skip
    j = tl.arange(0, LANES)
    z = mix(product, load_mixing(mixing, j[:, None], j[None, :], SQUARES))
    weights = load_mixing(mixing, square[:, None], j[None, :], SQUARES)
    d = tl.arange(0, P)[None, :]
    y = tl.zeros((BLOCK, P), tl.float32)
    for start in range(0, tokens, STEP):
        m = start + tl.arange(0, STEP)
        ok = (m < tokens)[:, None] & (d < D)
        at = m.to(tl.int64)[:, None]
        g = feature(tl.load(k + at * k_n + d, mask=ok, other=0.0))
        value = operand(tl.load(v + at * v_n + d, mask=ok, other=0.0), EXACT)
        theirs = square_of(m, tokens, width, by_width, by_rows, by_columns, SQUARES)
        s = accumulate(tl.zeros((BLOCK, STEP), tl.float32), f, tl.trans(g), EXACT)
        s *= weights_of(weights, one_hot(theirs, LANES, EXACT), EXACT)
        y = accumulate(y, s, value, EXACT)
    y /= (z + EPSILON)[:, None]
    ok = here[:, None] & (d < D)
    at = n.to(tl.int64)[:, None]
    if LOCAL:
        branch = local + b * l_b + h * l_h + at * l_n + d
        y += tl.load(branch, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + b * o_b + h * o_h + at * o_n + d, y.to(out.dtype.element_ty), mask=ok)


def forward(
    how: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    local: Tensor | None,
    sums: Tensor,
    out: Tensor,
) -> None:
    """Write the result to `out`, and to `sums` what `backward` needs: phi(k), summed by square."""
    launch(_sum_keys, how.sum_keys, key, sums, *strides_of(key))
    launch(
        _attend, how.attend,
        query, key, value, mixing, or_else(local, query), sums, out,
        *strides_of(query), *strides_of(key), *strides_of(value), *strides_of(local),
        *strides_of(out),
    )  # fmt: skip
