"""The forward kernels of `agent_attention`; `plan.py` has their order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from ..runtime.mathematics import multiply, shrinkage, single
from .mathematics import (
    NEVER,
    SCALARS,
    agent_rows,
    bias_tile,
    convolve,
    scores_of,
    softmax_weights,
)
from .plan import Plan, pad_row


@triton.jit(do_not_specialize=SCALARS)
def _pool(
    x, agents, x_b, x_n, height, width, prefix, heads,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One agent of one image, CHANNELS channels."""
    count: tl.constexpr = ROWS * COLUMNS
    b = (tl.program_id(0) // count).to(tl.int64)
    cell = tl.program_id(0) % count
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    live = channel < heads * D
    i = cell // COLUMNS
    j = cell % COLUMNS
    top = i * height // ROWS
    left = j * width // COLUMNS
    wide = tl.cdiv((j + 1) * width, COLUMNS) - left
    size = (tl.cdiv((i + 1) * height, ROWS) - top) * wide
    total = tl.zeros((BLOCK, CHANNELS), tl.float32)
    for start in range(0, size, BLOCK):
        t = start + tl.arange(0, BLOCK)
        row = t // wide
        n = (prefix + (top + row) * width + left + t - row * wide).to(tl.int64)
        ok = (t < size)[:, None] & live[None, :]
        pointers = x + b * x_b + n[:, None] * x_n + channel[None, :]
        total += tl.load(pointers, mask=ok, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / size
    head = channel // D
    place = ((b * heads + head) * count + cell) * D + channel - head * D
    tl.store(agents + place, mean.to(agents.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=SCALARS)
def _aggregate(
    x, agents, bias, values, statistics, x_b, x_n, bias_a, tokens, per_split, heads, scale,
    COUNT: tl.constexpr, AGENTS: tl.constexpr,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """softmax(a k^T + B1) v over one split of the tokens, of several not divided by the sum."""
    scale = single(scale)
    bh = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    h = bh % heads
    x += bh // heads * x_b + (heads + h) * D
    d = tl.arange(0, P)[None, :]
    i = tl.program_id(2) * AGENTS + tl.arange(0, AGENTS)
    a = agent_rows(agents + bh * (COUNT * D), i, COUNT, D, P)
    bias += h * COUNT * bias_a
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    maximum = tl.full((AGENTS,), -float("inf"), tl.float32)
    mass = tl.zeros((AGENTS,), tl.float32)
    total = tl.zeros((AGENTS, P), tl.float32)
    for start in range(first, last, BLOCK):
        n = tl.multiple_of(start + tl.arange(0, BLOCK), 16)
        valid = n < last
        ok = valid[:, None] & (d < D)
        at = x + n.to(tl.int64)[:, None] * x_n + d
        k = tl.load(at, mask=ok, other=0.0)
        v = tl.load(at + heads * D, mask=ok, other=0.0)
        b = bias_tile(bias, i[:, None], n[None, :], bias_a, COUNT)
        s = tl.where(valid[None, :], scores_of(a, k, b, scale), NEVER)
        higher = tl.maximum(maximum, tl.max(s, 1))
        shrink = shrinkage(maximum, higher, EXACT)
        p = softmax_weights(s, higher[:, None], valid[None, :], EXACT)
        mass = mass * shrink + tl.sum(p, 1)
        total = multiply(p.to(v.dtype), v, total * shrink[:, None])
        maximum = higher
    if tl.num_programs(1) == 1:
        total /= mass[:, None]
    part = bh * tl.num_programs(1) + split
    live = i < COUNT
    tl.store(values + (part * COUNT + i[:, None]) * D + d, total, mask=live[:, None] & (d < D))
    tl.store(statistics + part * (2 * COUNT) + i, maximum, mask=live)
    tl.store(statistics + part * (2 * COUNT) + COUNT + i, mass, mask=live)


@triton.jit(do_not_specialize=SCALARS)
def _merge(
    value_parts, statistic_parts, values, statistics, splits,
    COUNT: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Merge the splits of `_aggregate`, for ROWS agents of one head."""
    bh = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, P)[None, :]
    live = i < COUNT
    value_parts += bh * splits * (COUNT * D)
    statistic_parts += bh * splits * (2 * COUNT)
    maximum = tl.full((ROWS,), -float("inf"), tl.float32)
    for start in range(0, splits, CHUNK):
        here = start + tl.arange(0, CHUNK)
        m = tl.load(
            statistic_parts + here[:, None] * (2 * COUNT) + i[None, :],
            mask=(here < splits)[:, None] & live[None, :],
            other=-float("inf"),
        )
        maximum = tl.maximum(maximum, tl.max(m, 0))
    maximum = tl.where(live, maximum, 0.0)
    mass = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, P), tl.float32)
    for start in range(0, splits, CHUNK):
        here = start + tl.arange(0, CHUNK)
        ok = (here < splits)[:, None] & live[None, :]
        at = statistic_parts + here[:, None] * (2 * COUNT) + i[None, :]
        factor = shrinkage(tl.load(at, mask=ok, other=-float("inf")), maximum[None, :], True)
        mass += tl.sum(factor * tl.load(at + COUNT, mask=ok, other=0.0), 0)
        tile = tl.load(
            value_parts + (here[:, None] * COUNT + i[None, :])[:, :, None] * D + d[None],
            mask=ok[:, :, None] & (d < D)[None],
            other=0.0,
        )
        total += tl.sum(tile * factor[:, :, None], 0)
    total /= tl.where(live, mass, 1.0)[:, None]
    tl.store(values + (bh * COUNT + i[:, None]) * D + d, total, mask=live[:, None] & (d < D))
    tl.store(statistics + bh * (2 * COUNT) + i, maximum, mask=live)
    tl.store(statistics + bh * (2 * COUNT) + COUNT + i, mass, mask=live)


@triton.jit(do_not_specialize=SCALARS)
def _broadcast(
    x, agents, values, bias, weight, weight_bias, out,
    x_b, x_n, bias_a, tokens, per_split, heads, height, width, prefix, scale,
    COUNT: tl.constexpr, AGENTS: tl.constexpr,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    K: tl.constexpr, WEIGHT_BIAS: tl.constexpr,
):  # fmt: skip
    scale = single(scale)
    bh = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    b = bh // heads
    h = bh % heads
    x += b * x_b + h * D
    out += b * tokens * heads * D + h * D
    agents += bh * (COUNT * D)
    values += bh * (COUNT * D)
    bias += (heads + h) * COUNT * bias_a
    column = tl.arange(0, P)
    d = column[None, :]
    i = tl.arange(0, AGENTS)
    if AGENTS >= COUNT:
        a = agent_rows(agents, i, COUNT, D, P)
        u = agent_rows(values, i, COUNT, D, P).to(a.dtype)
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    for start in range(first, last, BLOCK):
        n = tl.multiple_of(start + tl.arange(0, BLOCK), 16)
        valid = n < last
        ok = valid[:, None] & (d < D)
        at = n.to(tl.int64)[:, None]
        q = tl.load(x + at * x_n + d, mask=ok, other=0.0)
        if AGENTS >= COUNT:
            live = (i < COUNT)[None, :]
            table = bias_tile(bias, i[None, :], n[:, None], bias_a, COUNT)
            s = scores_of(q, a, table, scale)
            s = tl.where(live, s, NEVER)
            p = softmax_weights(s, tl.max(s, 1)[:, None], live, EXACT)
            mass = tl.sum(p, 1)
            y = multiply(p.to(u.dtype), u)
        else:
            maximum = tl.full((BLOCK,), -float("inf"), tl.float32)
            mass = tl.zeros((BLOCK,), tl.float32)
            y = tl.zeros((BLOCK, P), tl.float32)
            for j in range(0, COUNT, AGENTS):
                live = (j + i < COUNT)[None, :]
                a = agent_rows(agents, j + i, COUNT, D, P)
                u = agent_rows(values, j + i, COUNT, D, P).to(a.dtype)
                table = bias_tile(bias, (j + i)[None, :], n[:, None], bias_a, COUNT)
                s = scores_of(q, a, table, scale)
                s = tl.where(live, s, NEVER)
                higher = tl.maximum(maximum, tl.max(s, 1))
                shrink = shrinkage(maximum, higher, EXACT)
                p = softmax_weights(s, higher[:, None], live, EXACT)
                mass = mass * shrink + tl.sum(p, 1)
                y = multiply(p.to(u.dtype), u, y * shrink[:, None])
                maximum = higher
        y /= mass[:, None]
        y += convolve(
            x + 2 * heads * D, x_n, weight, h * D, n, last, prefix, height, width, D, P, K, False
        )
        if WEIGHT_BIAS:
            shift = tl.load(weight_bias + h * D + column, mask=column < D, other=0.0)
            y += tl.where((n >= prefix)[:, None], shift.to(tl.float32)[None, :], 0.0)
        tl.store(out + at * (heads * D) + d, y.to(out.dtype.element_ty), mask=ok)


def align_rows(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The biases in `dtype`, contiguous, their rows padded with zeros to a multiple of 16."""
    tokens = bias.shape[-1]
    if tokens % 16 == 0:
        return bias.to(dtype).contiguous()
    padded = bias.new_zeros(*bias.shape[:-1], pad_row(tokens), dtype=dtype)
    padded[..., :tokens] = bias
    return padded


def forward(
    how: Plan,
    projection: Tensor,
    bias: Tensor,
    weight: Tensor,
    weight_bias: Tensor | None,
    out: Tensor,
    agents: Tensor,
    values: Tensor,
    statistics: Tensor,
) -> None:
    """Write the result to `out`, and what `backward` needs to the others."""
    bias = align_rows(bias, projection.dtype)
    strides = projection.stride()[:2]
    launch(_pool, how.pool, projection, agents, *strides)
    parts = (values, statistics)
    if how.splits > 1:
        shapes = (
            (how.rows, how.splits, how.count, how.width),
            (how.rows, how.splits, 2, how.count),
        )
        parts = tuple(
            torch.empty(shape, dtype=torch.float32, device=out.device) for shape in shapes
        )
    launch(_aggregate, how.aggregate, projection, agents, bias, *parts, *strides)
    if how.splits > 1:
        launch(_merge, how.merge, *parts, values, statistics)
    launch(
        _broadcast, how.broadcast,
        projection, agents, values, bias, weight, weight if weight_bias is None else weight_bias,
        out, *strides,
    )  # fmt: skip
