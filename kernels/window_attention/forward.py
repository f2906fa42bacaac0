"""The forward kernel of `window_attention`; `plan.py` has its tiles."""

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from ..runtime.mathematics import add_product, multiply, shrinkage, single
from .mathematics import (
    MASKED,
    SCALARS,
    convolve,
    edge_of,
    load_rows,
    locate,
    position_bias,
    region_of,
    scores_of,
    store_rows,
    weigh,
)
from .plan import Plan


@triton.jit(do_not_specialize=SCALARS)
def _attend(
    p, table, fill, weight, bias, out, sums,
    p_b, p_r, p_c, o_b, o_r, o_c, channels, heads, scale,
    height, width, rows, columns, wh, ww, sh, sw, top, left, period_h, period_w,
    total, per, tiles, head, share,
    D: tl.constexpr, P: tl.constexpr, T: tl.constexpr, STREAMED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FILL: tl.constexpr, SHIFT: tl.constexpr,
    K: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One head of a tile of queries, for `per` windows in turn."""
    scale = single(scale)
    geometry = (height, width, rows, columns, wh, ww, sh, sw, top, left, period_h, period_w)
    TABLE: tl.constexpr = ROWS > 0
    EXACT: tl.constexpr = p.dtype.element_ty == tl.float32
    strides = (p_b, p_r, p_c)
    h = head + tl.program_id(0) % share
    rest = tl.program_id(0) // share
    tile = rest % tiles
    first = (rest // tiles) * per
    q_base = p + h * D
    k_base = q_base + channels
    v_base = k_base + channels
    fill += h * D
    weight += h * (D * K * K)
    tokens = wh * ww

    t = tile * T + tl.arange(0, T)
    y = t // ww
    x = t % ww
    known = t < tokens
    edge = edge_of(y, x, geometry)
    position = 0.0
    if TABLE and not STREAMED:
        position = position_bias(table + h, t, t, ww, heads, ROWS, COLUMNS)
    start = tl.zeros((T, P), tl.float32)
    if BIAS:
        d = tl.arange(0, P)
        start += tl.load(bias + h * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    for window in range(first, tl.minimum(first + per, total)):
        place = locate(window, y, x, geometry)
        region = region_of(window, edge, geometry)
        q = load_rows(q_base, strides, place, known, fill, D, P, FILL)
        if STREAMED:
            maximum = tl.full((T,), MASKED, tl.float32)
            mass = tl.zeros((T,), tl.float32)
            o = tl.zeros((T, P), tl.float32)
            for s0 in range(0, tokens, T):
                s = s0 + tl.arange(0, T)
                ys = s // ww
                xs = s % ww
                there = s < tokens
                key_place = locate(window, ys, xs, geometry)
                k = load_rows(k_base, strides, key_place, there, fill + channels, D, P, FILL)
                v = load_rows(v_base, strides, key_place, there, fill + 2 * channels, D, P, FILL)
                near = 0.0
                if TABLE:
                    near = position_bias(table + h, t, s, ww, heads, ROWS, COLUMNS)
                key_region = region_of(window, edge_of(ys, xs, geometry), geometry)
                score = scores_of(q, k, near, region, key_region, there, scale, TABLE, SHIFT)
                higher = tl.maximum(maximum, tl.max(score, 1))
                shrink = shrinkage(maximum, higher, EXACT)
                e = weigh(score, higher, there, EXACT)
                maximum = higher
                mass = mass * shrink + tl.sum(e, 1)
                o = add_product(o, shrink, e.to(v.dtype), v)
            at = (first.to(tl.int64) * share + (h - head)) * tokens + t  # the only window
            tl.store(sums + at, maximum + tl.log(mass), mask=known)
        else:
            k = load_rows(k_base, strides, place, known, fill + channels, D, P, FILL)
            v = load_rows(v_base, strides, place, known, fill + 2 * channels, D, P, FILL)
            score = scores_of(q, k, position, region, region, known, scale, TABLE, SHIFT)
            e = weigh(score, tl.max(score, 1), known, EXACT)
            mass = tl.sum(e, 1)
            o = multiply(e.to(v.dtype), v)
        o = o / mass[:, None] + start
        if K > 0:
            o = convolve(
                o, v_base, strides, window, y, x, geometry, weight, fill + 2 * channels,
                D, P, K, FILL, False,
            )  # fmt: skip
        store_rows(out + h * D, (o_b, o_r, o_c), place, known, o, D, P)


def forward(
    how: Plan,
    projection: Tensor,
    table: Tensor | None,
    fill: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    sums: Tensor,
) -> None:
    """Write the attention's result to `out`, and for streamed windows what backward needs."""
    tensors = [projection if x is None else x for x in (table, fill, weight, bias)]
    strides = (*projection.stride()[:3], *out.stride()[:3])
    for branch in how.branches:
        launch(_attend, branch.attend, projection, *tensors, out, sums[branch.sums], *strides)
