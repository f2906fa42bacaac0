"""The Triton kernels of `window_attention`, forward and backward.

A token's place in the map is arithmetic on its number (`window_tokens_triton`), so that the
packed projection is read where it lies and the packed gradient is written there.

A window of at most one tile is one step of a program, which goes through several windows of one
head: their position bias stays in registers, and so does the sum of its gradient. The backward
pass recomputes the softmax and has q, k, v and the result's gradient in hand at once, so that
every element is read once and written once: (3 C + C) + C forward, (3 C + C) + 3 C backward.

A larger window is streamed over its keys (forward, dq) or queries (dk, dv), and the
logarithms of the softmax's sums, 4 bytes a token and head, are kept for the backward pass.

No float is added atomically: what several programs contribute to is stored in parts and summed
in a fixed order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import window_attention_streamed_triton as streamed
from .triton_launch import launch, multiprocessors
from .triton_math import shrinkage
from .window_attention import largest_tile
from .window_tokens_triton import (
    MASKED,
    SCALARS,
    convolve,
    dot,
    edge_of,
    load_rows,
    locate,
    position_bias,
    region_of,
    scores_of,
    store_rows,
    weigh,
)


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
                o = dot(e.to(v.dtype), v, o * shrink[:, None])
            at = (first.to(tl.int64) * share + (h - head)) * tokens + t  # the only window
            tl.store(sums + at, maximum + tl.log(mass), mask=known)
        else:
            k = load_rows(k_base, strides, place, known, fill + channels, D, P, FILL)
            v = load_rows(v_base, strides, place, known, fill + 2 * channels, D, P, FILL)
            score = scores_of(q, k, position, region, region, known, scale, TABLE, SHIFT)
            e = weigh(score, tl.max(score, 1), known, EXACT)
            mass = tl.sum(e, 1)
            o = dot(e.to(v.dtype), v, tl.zeros((T, P), tl.float32))
        o = o / mass[:, None] + start
        if K > 0:
            o = convolve(
                o, v_base, strides, window, y, x, geometry, weight, fill + 2 * channels,
                D, P, K, FILL, False,
            )  # fmt: skip
        store_rows(out + h * D, (o_b, o_r, o_c), place, known, o, D, P)


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
    zero = tl.zeros((T, P), tl.float32)
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
        de = dot(g, tl.trans(v), tl.zeros((T, T), tl.float32))
        ds = e * (de - tl.sum(e * de, 1)[:, None])
        if TABLE:
            table_sum += ds
        dv = dot(tl.trans(e.to(g.dtype)), g, zero)
        ds = ds.to(q.dtype)
        dk = dot(tl.trans(ds), q, zero) * scale
        dq = dot(ds, k, zero) * scale
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


# Queries, and keys, of a tile of a streamed window, at most.
STREAMED_TILE = 64
# Programs that a multiprocessor holds at once, by their registers.
RESIDENT = 3
RESIDENT_BACKWARD = 2


def _parts_of(length: int, size: int) -> int:
    return -(-length // size)  # triton.cdiv costs more than a launch's arguments


def _power_of_2(length: int) -> int:
    return 1 << (length - 1).bit_length()


@dataclass(frozen=True)
class Branch:
    """The windows of one size, and the heads that attend in them."""

    sizes: dict[str, int]
    total: int
    tokens: int
    head: int
    share: int
    tile: int
    streamed: bool
    rows_kept: slice

    def plan(
        self, units: int, resident: int, device: torch.device, programs_each: int = 1
    ) -> tuple[int, int]:
        """Groups, and units of work a group, that fill the device once."""
        slots = max(1, resident * multiprocessors(device) // (self.share * programs_each))
        per = _parts_of(units, slots)
        return _parts_of(units, per), per

    def scalars(self, per: int, tiles: int) -> dict[str, int]:
        return self.sizes | {
            "total": self.total,
            "per": per,
            "tiles": tiles,
            "head": self.head,
            "share": self.share,
        }


class Problem:
    """What the launches share: shapes, tiles and the places of the windows."""

    def __init__(
        self,
        projection: Tensor,
        table: Tensor | None,
        fill: Tensor | None,
        weight: Tensor | None,
        heads: int,
        windows: Sequence[int],
        shift: Sequence[int],
        padding: str,
    ) -> None:
        self.batch, self.height, self.width, packed = projection.shape
        self.channels, self.heads = packed // 3, heads
        self.device = projection.device
        self.head_dim = self.channels // heads
        self.padded_dim = max(16, _power_of_2(self.head_dim))
        self.kernel = 0 if weight is None else weight.shape[-1]
        self.table_size = (0, 0) if table is None else tuple(table.shape[:2])
        self.shift = tuple(shift)
        self.padding = padding
        self.stages = 1 if projection.dtype == torch.float32 else 2
        limit = largest_tile(projection, heads, table)
        self.branches = list(self._branches(windows, limit))
        pads = any(
            b.total * b.tokens != self.batch * self.height * self.width for b in self.branches
        )
        self.filled = fill is not None and pads

    def _branches(self, windows: Sequence[int], limit: int) -> Iterator[Branch]:
        share = self.heads // (len(windows) // 2)
        kept = 0
        for i, (wh, ww) in enumerate(zip(windows[::2], windows[1::2], strict=True)):
            rows, columns = _parts_of(self.height, wh), _parts_of(self.width, ww)
            height, width = rows * wh, columns * ww
            centre = self.padding == "centre"
            after = self.padding == "end_after_shift"
            sizes = {
                "height": self.height,
                "width": self.width,
                "rows": rows,
                "columns": columns,
                "wh": wh,
                "ww": ww,
                "sh": self.shift[0],
                "sw": self.shift[1],
                "top": (height - self.height) // 2 if centre else 0,
                "left": (width - self.width) // 2 if centre else 0,
                "period_h": self.height if after else height,
                "period_w": self.width if after else width,
            }
            tokens, total = wh * ww, self.batch * rows * columns
            is_streamed = tokens > limit
            tile = min(limit, STREAMED_TILE) if is_streamed else _power_of_2(tokens)
            tile = max(16, tile)
            size = total * tokens * share if is_streamed else 0
            rows_kept = slice(kept, kept + size)
            kept += size
            yield Branch(sizes, total, tokens, i * share, share, tile, is_streamed, rows_kept)

    def common(self) -> dict[str, int | float]:
        return {
            "channels": self.channels,
            "heads": self.heads,
            "scale": self.head_dim**-0.5,
            "D": self.head_dim,
            "P": self.padded_dim,
            "ROWS": self.table_size[0],
            "COLUMNS": self.table_size[1],
            "FILL": self.filled,
            "SHIFT": any(self.shift),
        }

    def tuning(self, tile: int) -> dict[str, int]:
        return {"num_warps": 8 if tile > 64 else 4, "num_stages": self.stages}


def forward(
    problem: Problem,
    projection: Tensor,
    table: Tensor | None,
    fill: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    sums: Tensor,
) -> None:
    """Write the attention's result to `out`, and of streamed windows what backward needs."""
    table, fill, weight = (projection if x is None else x for x in (table, fill, weight))
    for branch in problem.branches:
        tiles = _parts_of(branch.tokens, branch.tile)
        groups, per = (
            (branch.total, 1)
            if branch.streamed
            else branch.plan(branch.total, RESIDENT, problem.device)
        )
        launch(
            _attend, (groups * tiles * branch.share,),
            projection, table, fill, weight, projection if bias is None else bias, out,
            sums[branch.rows_kept], *projection.stride()[:3], *out.stride()[:3],
            **branch.scalars(per, tiles), **problem.common(), T=branch.tile,
            STREAMED=branch.streamed, K=problem.kernel, BIAS=bias is not None,
            **problem.tuning(branch.tile),
        )  # fmt: skip


def backward(
    problem: Problem,
    grad: Tensor,
    projection: Tensor,
    table: Tensor | None,
    fill: Tensor | None,
    weight: Tensor | None,
    sums: Tensor,
    out: Tensor,
) -> tuple[Tensor | None, ...]:
    """Write the projection's gradient to `out`; those of table, fill, weight and bias."""
    tensors = [projection if x is None else x for x in (table, fill, weight)]
    dtable, dfill, dweight, dbias = None, None, None, None
    if fill is not None:
        dfill = torch.zeros(3, problem.channels, dtype=torch.float32, device=problem.device)
    if weight is not None:
        dweight, dbias = _weight_gradients(problem, grad, projection, tensors[1])
    for branch in problem.branches:
        run = _backward_streamed if branch.streamed else _backward_whole
        pairs, filled = run(problem, branch, grad, projection, *tensors, sums, out)
        if problem.filled:
            owned = slice(
                branch.head * problem.head_dim,
                (branch.head + branch.share) * problem.head_dim,
            )
            dfill[1:, owned] = filled.sum(0)[:, owned]
        if table is not None:
            dtable = _table_gradient(problem, branch, pairs.sum(0), table)
    return dtable, None if dfill is None else dfill.flatten(), dweight, dbias


def _parts(problem: Problem, groups: int, side: int, fills: int) -> tuple[Tensor, Tensor]:
    """Empty parts of the gradients of the table and of the fill."""
    pairs = (groups, problem.heads, side, side) if problem.table_size[0] else (0,)
    filled = (fills, 2, problem.channels) if problem.filled else (0,)
    return tuple(
        torch.empty(shape, dtype=torch.float32, device=problem.device) for shape in (pairs, filled)
    )


def _backward_whole(problem, branch, grad, projection, table, fill, weight, sums, out):
    groups, per = branch.plan(branch.total, RESIDENT_BACKWARD, problem.device)
    pairs, filled = _parts(problem, groups, branch.tile, groups)
    launch(
        _gradient, (groups * branch.share,),
        projection, table, fill, weight, grad, out, pairs, filled,
        *projection.stride()[:3], *grad.stride()[:3], *out.stride()[:3],
        **branch.scalars(per, 1), **problem.common(), T=branch.tile, K=problem.kernel,
        **problem.tuning(branch.tile),
    )  # fmt: skip
    return pairs, filled


def _backward_streamed(problem, branch, grad, projection, table, fill, weight, sums, out):
    tiles = _parts_of(branch.tokens, branch.tile)
    groups, per = branch.plan(branch.total, RESIDENT_BACKWARD, problem.device, tiles * tiles)
    pairs, filled = _parts(problem, groups, tiles * branch.tile, branch.total * tiles)
    kept = sums[branch.rows_kept]
    inner = torch.empty(kept.shape, dtype=torch.float32, device=problem.device)
    strides = (*projection.stride()[:3], *grad.stride()[:3])
    common = problem.common() | {"T": branch.tile} | problem.tuning(branch.tile)
    launch(
        streamed.query_gradient, (branch.total * tiles * branch.share,),
        projection, table, fill, grad, out, kept, inner, *strides, *out.stride()[:3],
        **branch.scalars(1, tiles), **common,
    )  # fmt: skip
    launch(
        streamed.key_gradient, (branch.total * tiles * branch.share,),
        projection, table, fill, weight, grad, out, kept, inner, filled,
        *strides, *out.stride()[:3], **branch.scalars(1, tiles), **common, K=problem.kernel,
    )  # fmt: skip
    if problem.table_size[0]:
        launch(
            streamed.bias_gradient, (groups * tiles * tiles * branch.share,),
            projection, table, fill, grad, kept, inner, pairs, *strides,
            **branch.scalars(per, tiles), **common,
        )  # fmt: skip
    return pairs, filled


def _table_gradient(problem: Problem, branch: Branch, pairs: Tensor, table: Tensor) -> Tensor:
    """The sum over equal offsets of the scores' gradient (heads, side, side)."""
    rows, columns = problem.table_size
    result = torch.empty(table.shape, dtype=torch.float32, device=problem.device)
    launch(
        _sum_pairs, (_parts_of(rows * columns, 32), problem.heads),
        pairs, result, branch.sizes["wh"], branch.sizes["ww"], pairs.shape[-1], problem.heads,
        ROWS=rows, COLUMNS=columns, OFFSETS=32, QUERIES=64,
    )  # fmt: skip
    return result


def _weight_gradients(
    problem: Problem, grad: Tensor, projection: Tensor, fill: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the convolution's weight (C, 1, k, k) and bias, in float32."""
    taps = problem.kernel**2
    total = torch.empty(taps + 1, problem.channels, dtype=torch.float32, device=problem.device)
    common = {key: problem.common()[key] for key in ("channels", "D", "P", "FILL")}
    for branch in problem.branches:
        tile = 16 if problem.kernel > 3 else 32
        tiles = _parts_of(branch.tokens, tile)
        groups, per = branch.plan(branch.total * tiles, RESIDENT, problem.device)
        parts = torch.empty(
            (groups, taps + 1, problem.channels), dtype=torch.float32, device=problem.device
        )
        launch(
            _weight_gradient, (groups * branch.share,),
            projection, fill, grad, parts, *projection.stride()[:3], *grad.stride()[:3],
            **branch.scalars(per, tiles), **common, T=tile, K=problem.kernel,
            num_warps=4, num_stages=1,
        )  # fmt: skip
        owned = slice(
            branch.head * problem.head_dim, (branch.head + branch.share) * problem.head_dim
        )
        total[:, owned] = parts[..., owned].sum(0)
    shape = (problem.channels, 1, problem.kernel, problem.kernel)
    return total[:taps].t().reshape(shape).contiguous(), total[taps].clone()
