"""The backward kernels of `window_attention` for windows larger than a tile.

One kernel goes over the keys of a tile of queries (dq), one over the queries of a tile of keys
(dk, dv), and one over the windows of a pair of tiles (the position bias).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from ..runtime.mathematics import add_product, multiply, single
from .mathematics import (
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
from .plan import Branch


@triton.jit(do_not_specialize=SCALARS)
def _query_gradient(
    p, table, fill, grad, dp, sums, inner,
    p_b, p_r, p_c, g_b, g_r, g_c, d_b, d_r, d_c, channels, heads, scale,
    height, width, rows, columns, wh, ww, sh, sw, top, left, period_h, period_w,
    total, per, tiles, head, share,
    D: tl.constexpr, P: tl.constexpr, T: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FILL: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Streamed: dq of a tile of queries, and `inner`, sum over keys of p dp, for dk."""
    scale = single(scale)
    geometry = (height, width, rows, columns, wh, ww, sh, sw, top, left, period_h, period_w)
    TABLE: tl.constexpr = ROWS > 0
    EXACT: tl.constexpr = p.dtype.element_ty == tl.float32
    strides = (p_b, p_r, p_c)
    h = head + tl.program_id(0) % share
    rest = tl.program_id(0) // share
    window = rest // tiles
    p += h * D
    fill += h * D
    tokens = wh * ww
    t = (rest % tiles) * T + tl.arange(0, T)
    y = t // ww
    x = t % ww
    known = t < tokens
    place = locate(window, y, x, geometry)
    region = region_of(window, edge_of(y, x, geometry), geometry)
    q = load_rows(p, strides, place, known, fill, D, P, FILL)
    g = load_rows(grad + h * D, (g_b, g_r, g_c), place, known, fill, D, P, False)
    at = (window.to(tl.int64) * share + (h - head)) * tokens + t
    logarithm = tl.load(sums + at, mask=known, other=0.0)
    mean = tl.zeros((T,), tl.float32)
    one = tl.full((T,), 1.0, tl.float32)
    dq = tl.zeros((T, P), tl.float32)
    # Two passes over the keys: the sum must be known before the difference is rounded.
    for step in range(0, 2 * tiles):
        s = (step % tiles) * T + tl.arange(0, T)
        ys = s // ww
        xs = s % ww
        there = s < tokens
        key_place = locate(window, ys, xs, geometry)
        k = load_rows(p + channels, strides, key_place, there, fill + channels, D, P, FILL)
        v = load_rows(p + 2 * channels, strides, key_place, there, fill + 2 * channels, D, P, FILL)
        near = 0.0
        if TABLE:
            near = position_bias(table + h, t, s, ww, heads, ROWS, COLUMNS)
        key_region = region_of(window, edge_of(ys, xs, geometry), geometry)
        score = scores_of(q, k, near, region, key_region, there, scale, TABLE, SHIFT)
        e = weigh(score, logarithm, there, EXACT)
        de = multiply(g, tl.trans(v))
        if step < tiles:
            mean += tl.sum(e * de, 1)
        else:
            ds = e * (de - mean[:, None])
            dq = add_product(dq, one, ds.to(k.dtype), k)
    tl.store(inner + at, mean, mask=known)
    store_rows(dp + h * D, (d_b, d_r, d_c), place, known, dq * scale, D, P)


@triton.jit(do_not_specialize=SCALARS)
def _key_gradient(
    p, table, fill, weight, grad, dp, sums, inner, fill_parts,
    p_b, p_r, p_c, g_b, g_r, g_c, d_b, d_r, d_c, channels, heads, scale,
    height, width, rows, columns, wh, ww, sh, sw, top, left, period_h, period_w,
    total, per, tiles, head, share,
    D: tl.constexpr, P: tl.constexpr, T: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FILL: tl.constexpr, SHIFT: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """Streamed: dk and dv of a tile of keys."""
    scale = single(scale)
    geometry = (height, width, rows, columns, wh, ww, sh, sw, top, left, period_h, period_w)
    TABLE: tl.constexpr = ROWS > 0
    EXACT: tl.constexpr = p.dtype.element_ty == tl.float32
    strides = (p_b, p_r, p_c)
    slopes = (g_b, g_r, g_c)
    turns = (d_b, d_r, d_c)
    h = head + tl.program_id(0) % share
    rest = tl.program_id(0) // share
    window = rest // tiles
    p += h * D
    dp += h * D
    grad += h * D
    fill += h * D
    tokens = wh * ww
    s = (rest % tiles) * T + tl.arange(0, T)
    ys = s // ww
    xs = s % ww
    there = s < tokens
    place = locate(window, ys, xs, geometry)
    key_region = region_of(window, edge_of(ys, xs, geometry), geometry)
    k = load_rows(p + channels, strides, place, there, fill + channels, D, P, FILL)
    v = load_rows(p + 2 * channels, strides, place, there, fill + 2 * channels, D, P, FILL)
    dk = tl.zeros((T, P), tl.float32)
    dv = tl.zeros((T, P), tl.float32)
    for t0 in range(0, tokens, T):
        t = t0 + tl.arange(0, T)
        y = t // ww
        x = t % ww
        known = t < tokens
        query_place = locate(window, y, x, geometry)
        q = load_rows(p, strides, query_place, known, fill, D, P, FILL)
        g = load_rows(grad, slopes, query_place, known, fill, D, P, False)
        at = (window.to(tl.int64) * share + (h - head)) * tokens + t
        # Queries beyond the window get so large a logarithm that they weigh nothing.
        logarithm = tl.load(sums + at, mask=known, other=1e30)
        mean = tl.load(inner + at, mask=known, other=0.0)
        near = 0.0
        if TABLE:
            near = position_bias(table + h, t, s, ww, heads, ROWS, COLUMNS)
        region = region_of(window, edge_of(y, x, geometry), geometry)
        score = scores_of(q, k, near, region, key_region, there, scale, TABLE, SHIFT)
        e = weigh(score, logarithm, there, EXACT)
        de = multiply(g, tl.trans(v))
        ds = e * (de - mean[:, None])
        dv = multiply(tl.trans(e.to(g.dtype)), g, dv)
        dk = multiply(tl.trans(ds.to(q.dtype)), q, dk)
    dk *= scale
    if K > 0:
        weight += h * (D * K * K)
        dv = convolve(
            dv, grad, slopes, window, ys, xs, geometry, weight, fill, D, P, K, False, True
        )
    store_rows(dp + channels, turns, place, there, dk, D, P)
    store_rows(dp + 2 * channels, turns, place, there, dv, D, P)
    if FILL:
        outside = (there & (place[3] == 0))[:, None]
        d = tl.arange(0, P)
        at = fill_parts + rest.to(tl.int64) * (2 * channels) + h * D + d
        tl.store(at, tl.sum(tl.where(outside, dk, 0.0), 0), mask=d < D)
        tl.store(at + channels, tl.sum(tl.where(outside, dv, 0.0), 0), mask=d < D)


@triton.jit(do_not_specialize=SCALARS)
def _bias_gradient(
    p, table, fill, grad, sums, inner, table_parts,
    p_b, p_r, p_c, g_b, g_r, g_c, channels, heads, scale,
    height, width, rows, columns, wh, ww, sh, sw, top, left, period_h, period_w,
    total, per, tiles, head, share,
    D: tl.constexpr, P: tl.constexpr, T: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FILL: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Streamed: the scores' gradient of a tile of queries and one of keys, over `per` windows."""
    scale = single(scale)
    geometry = (height, width, rows, columns, wh, ww, sh, sw, top, left, period_h, period_w)
    EXACT: tl.constexpr = p.dtype.element_ty == tl.float32
    strides = (p_b, p_r, p_c)
    h = head + tl.program_id(0) % share
    rest = tl.program_id(0) // share
    group = rest // (tiles * tiles)
    first = group * per
    p += h * D
    fill += h * D
    tokens = wh * ww
    t = ((rest // tiles) % tiles) * T + tl.arange(0, T)
    s = (rest % tiles) * T + tl.arange(0, T)
    known = t < tokens
    there = s < tokens
    position = position_bias(table + h, t, s, ww, heads, ROWS, COLUMNS)
    edge = edge_of(t // ww, t % ww, geometry)
    key_edge = edge_of(s // ww, s % ww, geometry)
    result = tl.zeros((T, T), tl.float32)
    for window in range(first, tl.minimum(first + per, total)):
        place = locate(window, t // ww, t % ww, geometry)
        key_place = locate(window, s // ww, s % ww, geometry)
        q = load_rows(p, strides, place, known, fill, D, P, FILL)
        k = load_rows(p + channels, strides, key_place, there, fill + channels, D, P, FILL)
        v = load_rows(p + 2 * channels, strides, key_place, there, fill + 2 * channels, D, P, FILL)
        g = load_rows(grad + h * D, (g_b, g_r, g_c), place, known, fill, D, P, False)
        at = ((first.to(tl.int64) + (window - first)) * share + (h - head)) * tokens + t
        logarithm = tl.load(sums + at, mask=known, other=1e30)
        mean = tl.load(inner + at, mask=known, other=0.0)
        region = region_of(window, edge, geometry)
        key_region = region_of(window, key_edge, geometry)
        score = scores_of(q, k, position, region, key_region, there, scale, True, SHIFT)
        de = multiply(g, tl.trans(v))
        result += weigh(score, logarithm, there, EXACT) * (de - mean[:, None])
    side = tiles * T
    at = table_parts + (group * heads + h).to(tl.int64) * (side * side)
    tl.store(at + t[:, None] * side + s[None, :], result)


def backward_streamed(
    branch: Branch,
    grad: Tensor,
    projection: Tensor,
    table: Tensor,
    fill: Tensor,
    weight: Tensor,
    sums: Tensor,
    out: Tensor,
    pairs: Tensor,
    filled: Tensor,
) -> None:
    """Write dq, dk and dv to `out`, the parts of the gradients of table and fill to the others."""
    sums = sums[branch.sums]
    inner = torch.empty(sums.shape, dtype=torch.float32, device=out.device)
    both = (*projection.stride()[:3], *grad.stride()[:3])
    strides = (*both, *out.stride()[:3])
    launch(
        _query_gradient, branch.query_gradient,
        projection, table, fill, grad, out, sums, inner, *strides,
    )  # fmt: skip
    launch(
        _key_gradient, branch.key_gradient,
        projection, table, fill, weight, grad, out, sums, inner, filled, *strides,
    )  # fmt: skip
    if pairs.numel():
        launch(
            _bias_gradient, branch.bias_gradient,
            projection, table, fill, grad, sums, inner, pairs, *both,
        )  # fmt: skip
