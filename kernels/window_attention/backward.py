"""The backward kernels of `window_attention`; `plan.py` has their tiles.

dq, dk and dv of windows of at most one tile (`streamed_backward.py` has those of larger
ones), and what every window's size shares: the sums for the table, the convolution's weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from ..runtime.mathematics import multiply, single
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
from .plan import Branch, Plan
from .streamed_backward import backward_streamed


@triton.jit(do_not_specialize=SCALARS)
def _gradient(
    p, table, fill, weight, grad, dp, table_parts, fill_parts,
    p_b, p_r, p_c, g_b, g_r, g_c, d_b, d_r, d_c, channels, heads, scale,
    height, width, rows, columns, wh, ww, sh, sw, top, left, period_h, period_w,
    total, per, tiles, head, share,
    D: tl.constexpr, P: tl.constexpr, T: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FILL: tl.constexpr, SHIFT: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of one head of `per` windows of one tile, and its part of the rest."""
    scale = single(scale)
    geometry = (height, width, rows, columns, wh, ww, sh, sw, top, left, period_h, period_w)
    TABLE: tl.constexpr = ROWS > 0
    EXACT: tl.constexpr = p.dtype.element_ty == tl.float32
    strides = (p_b, p_r, p_c)
    slopes = (g_b, g_r, g_c)
    turns = (d_b, d_r, d_c)
    h = head + tl.program_id(0) % share
    group = tl.program_id(0) // share
    first = group * per
    p += h * D
    dp += h * D
    grad += h * D
    fill += h * D
    weight += h * (D * K * K)

    t = tl.arange(0, T)
    y = t // ww
    x = t % ww
    known = t < wh * ww
    edge = edge_of(y, x, geometry)
    position = 0.0
    if TABLE:
        position = position_bias(table + h, t, t, ww, heads, ROWS, COLUMNS)
        table_sum = tl.zeros((T, T), tl.float32)
    if FILL:
        key_sum = tl.zeros((T, P), tl.float32)
        value_sum = tl.zeros((T, P), tl.float32)
    for window in range(first, tl.minimum(first + per, total)):
        place = locate(window, y, x, geometry)
        region = region_of(window, edge, geometry)
        q = load_rows(p, strides, place, known, fill, D, P, FILL)
        k = load_rows(p + channels, strides, place, known, fill + channels, D, P, FILL)
        v = load_rows(p + 2 * channels, strides, place, known, fill + 2 * channels, D, P, FILL)
        g = load_rows(grad, slopes, place, known, fill, D, P, False)
        score = scores_of(q, k, position, region, region, known, scale, TABLE, SHIFT)
        e = weigh(score, tl.max(score, 1), known, EXACT)
        e = e / tl.sum(e, 1)[:, None]
        de = multiply(g, tl.trans(v))
        ds = e * (de - tl.sum(e * de, 1)[:, None])
        if TABLE:
            table_sum += ds
        dv = multiply(tl.trans(e.to(g.dtype)), g)
        ds = ds.to(q.dtype)
        dk = multiply(tl.trans(ds), q) * scale
        dq = multiply(ds, k) * scale
        if K > 0:
            dv = convolve(
                dv, grad, slopes, window, y, x, geometry, weight, fill, D, P, K, False, True
            )
        store_rows(dp, turns, place, known, dq, D, P)
        store_rows(dp + channels, turns, place, known, dk, D, P)
        store_rows(dp + 2 * channels, turns, place, known, dv, D, P)
        if FILL:
            outside = (known & (place[3] == 0))[:, None]
            key_sum += tl.where(outside, dk, 0.0)
            value_sum += tl.where(outside, dv, 0.0)
    if TABLE:
        at = table_parts + (group * heads + h).to(tl.int64) * (T * T)
        tl.store(at + t[:, None] * T + t[None, :], table_sum)
    if FILL:
        d = tl.arange(0, P)
        at = fill_parts + group.to(tl.int64) * (2 * channels) + h * D + d
        tl.store(at, tl.sum(key_sum, 0), mask=d < D)
        tl.store(at + channels, tl.sum(value_sum, 0), mask=d < D)


@triton.jit(do_not_specialize=["wh", "ww", "side"])
def _sum_pairs(
    pairs, out, wh, ww, side, heads,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, OFFSETS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """The table's gradient: for each offset the sum over the pairs of tokens that far apart."""
    h = tl.program_id(1)
    pairs += h.to(tl.int64) * side * side
    row = tl.program_id(0) * OFFSETS + tl.arange(0, OFFSETS)
    dy = row // COLUMNS - ROWS // 2
    dx = row % COLUMNS - COLUMNS // 2
    result = tl.zeros((OFFSETS,), tl.float32)
    for t0 in range(0, wh * ww, QUERIES):
        t = t0 + tl.arange(0, QUERIES)
        y = (t // ww)[None, :] - dy[:, None]
        x = (t % ww)[None, :] - dx[:, None]
        inside = (y >= 0) & (y < wh) & (x >= 0) & (x < ww) & (t < wh * ww)[None, :]
        result += tl.sum(tl.load(pairs + t[None, :] * side + y * ww + x, mask=inside, other=0.0), 1)
    tl.store(out + row * heads + h, result, mask=row < ROWS * COLUMNS)


@triton.jit(do_not_specialize=SCALARS)
def _weight_gradient(
    p, fill, grad, parts,
    p_b, p_r, p_c, g_b, g_r, g_c, channels,
    height, width, rows, columns, wh, ww, sh, sw, top, left, period_h, period_w,
    total, per, tiles, head, share,
    D: tl.constexpr, P: tl.constexpr, T: tl.constexpr, FILL: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One head's part of the gradient of the convolution's weight, and of its bias, the last."""
    geometry = (height, width, rows, columns, wh, ww, sh, sw, top, left, period_h, period_w)
    h = head + tl.program_id(0) % share
    group = tl.program_id(0) // share
    p += 2 * channels + h * D
    fill += 2 * channels + h * D
    result = ()
    for _ in tl.static_range(K * K + 1):
        result = result + (tl.zeros((T, P), tl.float32),)  # noqa: RUF005
    for step in range(group * per, tl.minimum(group * per + per, total * tiles)):
        window = step // tiles
        t = (step % tiles) * T + tl.arange(0, T)
        y = t // ww
        x = t % ww
        known = y < wh
        place = locate(window, y, x, geometry)
        g = load_rows(grad + h * D, (g_b, g_r, g_c), place, known, fill, D, P, False).to(tl.float32)
        fresh = ()
        for tap in tl.static_range(K * K):
            v = y + (tap // K - K // 2)
            u = x + (tap % K - K // 2)
            there = known & (v >= 0) & (v < wh) & (u >= 0) & (u < ww)
            other = locate(window, v, u, geometry)
            value = load_rows(p, (p_b, p_r, p_c), other, there, fill, D, P, FILL)
            fresh = fresh + (result[tap] + g * value.to(tl.float32),)  # noqa: RUF005
        result = fresh + (result[K * K] + g,)  # noqa: RUF005
    d = tl.arange(0, P)
    parts += group.to(tl.int64) * ((K * K + 1) * channels) + h * D + d
    for tap in tl.static_range(K * K + 1):
        tl.store(parts + tap * channels, tl.sum(result[tap], 0), mask=d < D)


def backward(
    how: Plan,
    grad: Tensor,
    projection: Tensor,
    table: Tensor | None,
    fill: Tensor | None,
    weight: Tensor | None,
    sums: Tensor,
    out: Tensor,
) -> tuple[Tensor | None, ...]:
    """Write the projection's gradient to `out`; return those of table, fill, weight and bias."""
    tensors = [projection if x is None else x for x in (table, fill, weight)]
    dtable, dfill, dweight, dbias = None, None, None, None
    if fill is not None:
        dfill = torch.zeros(3, how.channels, dtype=torch.float32, device=out.device)
    if weight is not None:
        dweight, dbias = _weight_gradients(how, grad, projection, tensors[1])
    for branch in how.branches:
        pairs, filled = (
            torch.empty(shape, dtype=torch.float32, device=out.device)
            for shape in (branch.pair_parts, branch.fill_parts)
        )
        run = backward_streamed if branch.is_streamed else _backward_whole
        run(branch, grad, projection, *tensors, sums, out, pairs, filled)
        if how.is_filled:
            dfill[1:, branch.channels] = filled.sum(0)[:, branch.channels]
        if table is not None:
            # The sum over equal offsets of the scores' gradient, (heads, side, side).
            dtable = torch.empty(table.shape, dtype=torch.float32, device=out.device)
            launch(_sum_pairs, branch.sum_pairs, pairs.sum(0), dtable)
    return dtable, None if dfill is None else dfill.flatten(), dweight, dbias


def _backward_whole(
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
    launch(
        _gradient, branch.gradient,
        projection, table, fill, weight, grad, out, pairs, filled,
        *projection.stride()[:3], *grad.stride()[:3], *out.stride()[:3],
    )  # fmt: skip


def _weight_gradients(
    how: Plan, grad: Tensor, projection: Tensor, fill: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the convolution's weight (C, 1, k, k) and bias, in float32."""
    taps = how.kernel**2
    total = torch.empty(taps + 1, how.channels, dtype=torch.float32, device=grad.device)
    strides = (*projection.stride()[:3], *grad.stride()[:3])
    for branch in how.branches:
        parts = torch.empty(branch.weight_parts, dtype=torch.float32, device=grad.device)
        launch(_weight_gradient, branch.weight_gradient, projection, fill, grad, parts, *strides)
        total[:, branch.channels] = parts[..., branch.channels].sum(0)
    shape = (how.channels, 1, how.kernel, how.kernel)
    return total[:taps].t().reshape(shape).contiguous(), total[taps].clone()
