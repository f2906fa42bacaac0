"""The Triton kernels of `agent_attention`, forward and backward.

With a the agents, u the values that they aggregate, s the scores and p their softmax:

    forward     pool         a, adaptive averages of q
                aggregate    u and its softmax's maximum and sum     partial, per split of tokens
                merge        the partial results, rescaled to one maximum
                broadcast    out = softmax(q a^T + B2) u + conv(v)
    backward    agent gradient of broadcast     da, du                    partial, per split
                finish       du / sum, and its product with u, which aggregate's softmax subtracts
                token gradient of aggregate     dk, dv + conv^T(dout), dB1
                agent gradient of aggregate     da                        partial, per split
                finish       da, divided by the tokens of each agent's cell
                token gradient of broadcast     dq + what comes through the agents, dB2

A token gradient's program holds one block of tokens of one head and runs through images, so
that it sums the biases' gradients in registers. Up to 128 agents are one block, whose softmax
is recomputed whole; more are looped over, and *statistics* of the softmax over agents are made
once in backward. Nothing of size N A per image is stored; every sum has a fixed order.

For float16's sake, products with u's gradient are taken of du / sum and exp(s - maximum), each
of ordinary size, where du and the softmax alone grow and shrink with N.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import Tile, launch, multiprocessors, split_tokens
from .triton_math import exponential, multiply

# Scores and differences of scores that stand for none: their exponential is zero.
NEVER = tl.constexpr(-1e30)
VANISHED = tl.constexpr(-1e4)


@triton.jit
def _dot(a, b, accumulator):
    if a.dtype == tl.float32:
        return tl.dot(a, b, accumulator, input_precision="ieee")
    else:
        return multiply(a, b, accumulator)


@triton.jit
def _weights(scores, maximum, valid, EXACT: tl.constexpr):
    """exp(scores - maximum), zero where not valid."""
    return exponential(tl.where(valid, scores - maximum, VANISHED), EXACT)


@triton.jit
def _scores(x, y, bias, scale):
    """scale x y^T + bias."""
    product = _dot(x, tl.trans(y), tl.zeros((x.shape[0], y.shape[0]), tl.float32))
    return product * scale + bias.to(tl.float32)


@triton.jit
def _softmax(scores, valid, EXACT: tl.constexpr):
    """Softmax over the last axis."""
    scores = tl.where(valid, scores, NEVER)
    p = _weights(scores, tl.max(scores, 1)[:, None], valid, EXACT)
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def _rows(pointer, i, count, D: tl.constexpr, P: tl.constexpr):
    """Rows `i` of a contiguous (count, D), zero where there are none."""
    d = tl.arange(0, P)[None, :]
    return tl.load(pointer + i[:, None] * D + d, mask=(i < count)[:, None] & (d < D), other=0.0)


@triton.jit
def _table(bias, i, n, bias_a, COUNT: tl.constexpr):
    """A head's bias of agents `i` and tokens `n`, which broadcast against each other.

    Its rows are padded with zeros to a multiple of 16, so that eight entries are one load.
    """
    mask = (i < COUNT) & (n < bias_a)
    return tl.load(bias + i.to(tl.int64) * bias_a + n, mask=mask, other=0.0)


@triton.jit
def _convolve(
    x, x_n, weight, channel, n, last, prefix, height, width,
    D: tl.constexpr, P: tl.constexpr, K: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """The depthwise convolution of the map that starts at row `prefix` of x, at tokens `n`."""
    d = tl.arange(0, P)
    live = d < D
    row = (n - prefix) // width
    column = (n - prefix) - row * width
    mapped = (n >= prefix) & (n < last)
    total = tl.zeros((n.shape[0], P), tl.float32)
    # Rows are a loop, so that registers hold the weights of one at a time.
    for i in range(0, K):
        r = row + i - K // 2
        at = (n + (i - K // 2) * width).to(tl.int64)
        in_row = mapped & (r >= 0) & (r < height)
        for j in tl.static_range(K):
            c = column + (j - K // 2)
            ok = in_row & (c >= 0) & (c < width)
            pointers = x + (at + (j - K // 2))[:, None] * x_n + d[None, :]
            tile = tl.load(pointers, mask=ok[:, None] & live[None, :], other=0.0)
            tap = K * K - 1 - i * K - j if BACKWARD else i * K + j
            factor = tl.load(weight + (channel + d) * (K * K) + tap, mask=live, other=0.0)
            total += tile.to(tl.float32) * factor.to(tl.float32)[None, :]
    return total


_SCALARS = [
    "tokens",
    "per_split",
    "heads",
    "height",
    "width",
    "prefix",
    "batch",
    "per_chunk",
    "splits",
    "down",
    "right",
]


@triton.jit(do_not_specialize=_SCALARS)
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


@triton.jit(do_not_specialize=_SCALARS)
def _aggregate(
    x, agents, bias, values, statistics, x_b, x_n, bias_a, tokens, per_split, heads, scale,
    COUNT: tl.constexpr, AGENTS: tl.constexpr,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """softmax(a k^T + B1) v over one split of the tokens; undivided where there are several."""
    bh = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    h = bh % heads
    x += bh // heads * x_b + (heads + h) * D
    d = tl.arange(0, P)[None, :]
    i = tl.program_id(2) * AGENTS + tl.arange(0, AGENTS)
    a = _rows(agents + bh * (COUNT * D), i, COUNT, D, P)
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
        b = _table(bias, i[:, None], n[None, :], bias_a, COUNT)
        s = tl.where(valid[None, :], _scores(a, k, b, scale), NEVER)
        higher = tl.maximum(maximum, tl.max(s, 1))
        shrink = tl.exp(maximum - higher)
        p = _weights(s, higher[:, None], valid[None, :], EXACT)
        mass = mass * shrink + tl.sum(p, 1)
        total = _dot(p.to(v.dtype), v, total * shrink[:, None])
        maximum = higher
    if tl.num_programs(1) == 1:
        total /= mass[:, None]
    part = bh * tl.num_programs(1) + split
    live = i < COUNT
    tl.store(values + (part * COUNT + i[:, None]) * D + d, total, mask=live[:, None] & (d < D))
    tl.store(statistics + part * (2 * COUNT) + i, maximum, mask=live)
    tl.store(statistics + part * (2 * COUNT) + COUNT + i, mass, mask=live)


@triton.jit(do_not_specialize=_SCALARS)
def _merge(
    value_parts, statistic_parts, values, statistics, splits,
    COUNT: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The splits of `_aggregate` in one: ROWS agents of one head."""
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
        factor = tl.exp(tl.load(at, mask=ok, other=-float("inf")) - maximum[None, :])
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


@triton.jit(do_not_specialize=_SCALARS)
def _broadcast(
    x, agents, values, bias, weight, weight_bias, out,
    x_b, x_n, bias_a, tokens, per_split, heads, height, width, prefix, scale,
    COUNT: tl.constexpr, AGENTS: tl.constexpr,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    K: tl.constexpr, WEIGHT_BIAS: tl.constexpr,
):  # fmt: skip
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
        a = _rows(agents, i, COUNT, D, P)
        u = _rows(values, i, COUNT, D, P).to(a.dtype)
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
            table = _table(bias, i[None, :], n[:, None], bias_a, COUNT)
            s = _scores(q, a, table, scale)
            s = tl.where(live, s, NEVER)
            p = _weights(s, tl.max(s, 1)[:, None], live, EXACT)
            mass = tl.sum(p, 1)
            y = _dot(p.to(u.dtype), u, tl.zeros((BLOCK, P), tl.float32))
        else:
            maximum = tl.full((BLOCK,), -float("inf"), tl.float32)
            mass = tl.zeros((BLOCK,), tl.float32)
            y = tl.zeros((BLOCK, P), tl.float32)
            for j in range(0, COUNT, AGENTS):
                live = (j + i < COUNT)[None, :]
                a = _rows(agents, j + i, COUNT, D, P)
                u = _rows(values, j + i, COUNT, D, P).to(a.dtype)
                table = _table(bias, (j + i)[None, :], n[:, None], bias_a, COUNT)
                s = _scores(q, a, table, scale)
                s = tl.where(live, s, NEVER)
                higher = tl.maximum(maximum, tl.max(s, 1))
                shrink = tl.exp(maximum - higher)
                p = _weights(s, higher[:, None], live, EXACT)
                mass = mass * shrink + tl.sum(p, 1)
                y = _dot(p.to(u.dtype), u, y * shrink[:, None])
                maximum = higher
        y /= mass[:, None]
        y += _convolve(
            x + 2 * heads * D, x_n, weight, h * D, n, last, prefix, height, width, D, P, K, False
        )
        if WEIGHT_BIAS:
            shift = tl.load(weight_bias + h * D + column, mask=column < D, other=0.0)
            y += tl.where((n >= prefix)[:, None], shift.to(tl.float32)[None, :], 0.0)
        tl.store(out + at * (heads * D) + d, y.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=_SCALARS)
def _broadcast_statistics(
    x, grad, agents, values, bias, statistics,
    x_b, x_n, g_b, g_n, bias_a, tokens, per_split, heads, scale,
    COUNT: tl.constexpr, AGENTS: tl.constexpr,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the softmax over many agents, per token: the logarithm of its sum, and sum(p dp)."""
    bh = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    b = bh // heads
    h = bh % heads
    x += b * x_b + h * D
    grad += b * g_b + h * D
    agents += bh * (COUNT * D)
    values += bh * (COUNT * D)
    bias += (heads + h) * COUNT * bias_a
    statistics += bh * 2 * tokens
    d = tl.arange(0, P)[None, :]
    i = tl.arange(0, AGENTS)
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    for start in range(first, last, BLOCK):
        n = tl.multiple_of(start + tl.arange(0, BLOCK), 16)
        valid = n < last
        ok = valid[:, None] & (d < D)
        at = n.to(tl.int64)[:, None]
        q = tl.load(x + at * x_n + d, mask=ok, other=0.0)
        dy = tl.load(grad + at * g_n + d, mask=ok, other=0.0)
        maximum = tl.full((BLOCK,), -float("inf"), tl.float32)
        mass = tl.zeros((BLOCK,), tl.float32)
        inner = tl.zeros((BLOCK,), tl.float32)
        for j in range(0, COUNT, AGENTS):
            live = (j + i < COUNT)[None, :]
            a = _rows(agents, j + i, COUNT, D, P)
            u = _rows(values, j + i, COUNT, D, P).to(a.dtype)
            table = _table(bias, (j + i)[None, :], n[:, None], bias_a, COUNT)
            s = _scores(q, a, table, scale)
            s = tl.where(live, s, NEVER)
            higher = tl.maximum(maximum, tl.max(s, 1))
            shrink = tl.exp(maximum - higher)
            p = _weights(s, higher[:, None], live, EXACT)
            dp = _dot(dy, tl.trans(u), tl.zeros((BLOCK, AGENTS), tl.float32))
            mass = mass * shrink + tl.sum(p, 1)
            inner = inner * shrink + tl.sum(p * dp, 1)
            maximum = higher
        tl.store(statistics + n, maximum + tl.log(mass), mask=valid)
        tl.store(statistics + tokens + n, inner / mass, mask=valid)


@triton.jit
def _broadcast_gradient(
    q, dy, a, u, bias, live, valid, statistics, n, tokens, scale,
    WHOLE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """p and ds of the softmax over agents, (tokens, agents)."""
    s = _scores(q, a, bias, scale)
    dp = _dot(dy, tl.trans(u), tl.zeros((q.shape[0], a.shape[0]), tl.float32))
    if WHOLE:
        p = _softmax(s, live, EXACT)
        # Of the very dp that it is taken from: what is left of a one-hot softmax is exact.
        inner = tl.sum(p * dp, 1)
    else:
        p = _weights(s, tl.load(statistics + n, mask=valid, other=0.0)[:, None], live, EXACT)
        inner = tl.load(statistics + tokens + n, mask=valid, other=0.0)
    return p, p * (dp - inner[:, None])


@triton.jit(do_not_specialize=_SCALARS)
def _broadcast_agent_gradient(
    x, grad, agents, values, bias, statistics, agent_parts, value_parts,
    x_b, x_n, g_b, g_n, bias_a, tokens, per_split, heads, scale, part_stride,
    COUNT: tl.constexpr, AGENTS: tl.constexpr,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    WHOLE: tl.constexpr = AGENTS >= COUNT
    b = bh // heads
    h = bh % heads
    x += b * x_b + h * D
    grad += b * g_b + h * D
    bias += (heads + h) * COUNT * bias_a
    statistics += bh * 2 * tokens
    d = tl.arange(0, P)[None, :]
    i = tl.program_id(2) * AGENTS + tl.arange(0, AGENTS)
    live = (i < COUNT)[None, :]
    a = _rows(agents + bh * (COUNT * D), i, COUNT, D, P)
    u = _rows(values + bh * (COUNT * D), i, COUNT, D, P).to(a.dtype)
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    da = tl.zeros((AGENTS, P), tl.float32)
    du = tl.zeros((AGENTS, P), tl.float32)
    for start in range(first, last, BLOCK):
        n = tl.multiple_of(start + tl.arange(0, BLOCK), 16)
        valid = n < last
        ok = valid[:, None] & (d < D)
        at = n.to(tl.int64)[:, None]
        q = tl.load(x + at * x_n + d, mask=ok, other=0.0)
        dy = tl.load(grad + at * g_n + d, mask=ok, other=0.0)
        table = _table(bias, i[None, :], n[:, None], bias_a, COUNT)
        p, ds = _broadcast_gradient(
            q, dy, a, u, table, live, valid, statistics, n, tokens, scale, WHOLE, EXACT
        )
        # A missing token's dy and q are zero.
        du = _dot(tl.trans(p.to(q.dtype)), dy, du)
        da = _dot(tl.trans(ds.to(q.dtype)), q, da)
    ok = (i < COUNT)[:, None] & (d < D)
    place = split * (COUNT * D) + i[:, None] * D + d
    tl.store(agent_parts + bh * part_stride + place, da * scale, mask=ok)
    tl.store(value_parts + bh * tl.num_programs(1) * (COUNT * D) + place, du, mask=ok)


@triton.jit(do_not_specialize=_SCALARS)
def _finish(
    parts, values, statistics, gradient, inner, splits, height, width,
    COLUMNS: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, AGENT: tl.constexpr,
):  # fmt: skip
    """Sum over splits of the gradient of ROWS agents, divided by the tokens of each one's cell;
    or of their values, divided by their softmax's sum, and its product with the values."""
    bh = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, P)[None, :]
    live = i < COUNT
    ok = live[:, None] & (d < D)
    parts += bh * splits * (COUNT * D)
    total = tl.zeros((ROWS, P), tl.float32)
    for start in range(0, splits, CHUNK):
        here = start + tl.arange(0, CHUNK)
        tile = tl.load(
            parts + (here[:, None] * COUNT + i[None, :])[:, :, None] * D + d[None],
            mask=(here < splits)[:, None, None] & ok[None],
            other=0.0,
        )
        total += tl.sum(tile, 0)
    place = (bh * COUNT + i[:, None]) * D + d
    if AGENT:
        rows: tl.constexpr = COUNT // COLUMNS
        r = i // COLUMNS
        c = i % COLUMNS
        tall = tl.cdiv((r + 1) * height, rows) - r * height // rows
        wide = tl.cdiv((c + 1) * width, COLUMNS) - c * width // COLUMNS
        total /= (tall * wide).to(tl.float32)[:, None]
        tl.store(gradient + place, total.to(gradient.dtype.element_ty), mask=ok)
    else:
        total /= tl.load(statistics + bh * (2 * COUNT) + COUNT + i, mask=live, other=1.0)[:, None]
        rounded = total.to(gradient.dtype.element_ty)
        tl.store(gradient + place, rounded, mask=ok)
        u = tl.load(values + place, mask=ok, other=0.0)
        tl.store(inner + bh * COUNT + i, tl.sum(rounded.to(tl.float32) * u, 1), mask=live)


@triton.jit(do_not_specialize=_SCALARS)
def _aggregate_agent_gradient(
    x, agents, slopes, bias, statistics, inner, parts,
    x_b, x_n, bias_a, tokens, per_split, heads, scale, part_stride,
    COUNT: tl.constexpr, AGENTS: tl.constexpr,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    h = bh % heads
    x += bh // heads * x_b + (heads + h) * D
    d = tl.arange(0, P)[None, :]
    i = tl.program_id(2) * AGENTS + tl.arange(0, AGENTS)
    live = i < COUNT
    a = _rows(agents + bh * (COUNT * D), i, COUNT, D, P)
    g = _rows(slopes + bh * (COUNT * D), i, COUNT, D, P)
    maximum = tl.load(statistics + bh * (2 * COUNT) + i, mask=live, other=0.0)[:, None]
    subtracted = tl.load(inner + bh * COUNT + i, mask=live, other=0.0)[:, None]
    bias += h * COUNT * bias_a
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    da = tl.zeros((AGENTS, P), tl.float32)
    for start in range(first, last, BLOCK):
        n = tl.multiple_of(start + tl.arange(0, BLOCK), 16)
        valid = n < last
        ok = valid[:, None] & (d < D)
        at = x + n.to(tl.int64)[:, None] * x_n + d
        k = tl.load(at, mask=ok, other=0.0)
        v = tl.load(at + heads * D, mask=ok, other=0.0)
        here = live[:, None] & valid[None, :]
        s = _scores(a, k, _table(bias, i[:, None], n[None, :], bias_a, COUNT), scale)
        p = _weights(s, maximum, here, EXACT)
        dp = _dot(g, tl.trans(v), tl.zeros((AGENTS, BLOCK), tl.float32))
        da = _dot((p * (dp - subtracted)).to(k.dtype), k, da)
    ok = live[:, None] & (d < D)
    parts += bh * part_stride + split * (COUNT * D)
    tl.store(parts + i[:, None] * D + d, da * scale, mask=ok)


@triton.jit
def _aggregate_gradient(
    k, v, a, g, bias, maximum, inner, here, scale, EXACT: tl.constexpr
):  # fmt: skip
    """p times its softmax's sum, and ds, of the softmax over tokens, (tokens, agents)."""
    p = _weights(_scores(k, a, bias, scale), maximum[None, :], here, EXACT)
    dp = _dot(v, tl.trans(g), tl.zeros((k.shape[0], a.shape[0]), tl.float32))
    return p, p * (dp - inner[None, :])


@triton.jit(do_not_specialize=_SCALARS)
def _aggregate_token_gradient(
    x, grad, agents, slopes, bias, statistics, inner, weight, dx, dbias,
    x_b, x_n, g_b, g_n, dx_b, dx_n,
    bias_a, tokens, heads, height, width, prefix, batch, per_chunk, scale,
    COUNT: tl.constexpr, AGENTS: tl.constexpr,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr,
    BIAS: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """dk and dv if WRITE; if BIAS, one block of agents' dB1, summed over the images of a chunk."""
    h = tl.program_id(0)
    chunk = tl.program_id(2)
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    BLOCKS: tl.constexpr = (COUNT + AGENTS - 1) // AGENTS
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = n < tokens
    d = tl.arange(0, P)[None, :]
    ok = valid[:, None] & (d < D)
    at = n.to(tl.int64)[:, None]
    i = tl.arange(0, AGENTS)
    bias += h.to(tl.int64) * COUNT * bias_a
    if BIAS:
        i += chunk % BLOCKS * AGENTS
        chunk //= BLOCKS
        live = i < COUNT
        here = live[None, :] & valid[:, None]
        table = _table(bias, i[None, :], n[:, None], bias_a, COUNT)
        total = tl.zeros((BLOCK, AGENTS), tl.float32)
    first = chunk * per_chunk
    b = first.to(tl.int64)
    for _image in range(first, tl.minimum(first + per_chunk, batch)):
        bh = b * heads + h
        key = x + b * x_b + (heads + h) * D + at * x_n + d
        k = tl.load(key, mask=ok, other=0.0)
        v = tl.load(key + heads * D, mask=ok, other=0.0)
        if BIAS:
            a = _rows(agents + bh * (COUNT * D), i, COUNT, D, P)
            g = _rows(slopes + bh * (COUNT * D), i, COUNT, D, P)
            m = tl.load(statistics + bh * (2 * COUNT) + i, mask=live, other=0.0)
            r = tl.load(inner + bh * COUNT + i, mask=live, other=0.0)
            p, ds = _aggregate_gradient(k, v, a, g, table, m, r, here, scale, EXACT)
            total += ds
            if WRITE:
                dk = _dot(ds.to(k.dtype), a, tl.zeros((BLOCK, P), tl.float32))
                dv = _dot(p.to(k.dtype), g, tl.zeros((BLOCK, P), tl.float32))
        else:
            dk = tl.zeros((BLOCK, P), tl.float32)
            dv = tl.zeros((BLOCK, P), tl.float32)
            for j in range(0, COUNT, AGENTS):
                live = j + i < COUNT
                here = live[None, :] & valid[:, None]
                table = _table(bias, (j + i)[None, :], n[:, None], bias_a, COUNT)
                a = _rows(agents + bh * (COUNT * D), j + i, COUNT, D, P)
                g = _rows(slopes + bh * (COUNT * D), j + i, COUNT, D, P)
                m = tl.load(statistics + bh * (2 * COUNT) + j + i, mask=live, other=0.0)
                r = tl.load(inner + bh * COUNT + j + i, mask=live, other=0.0)
                p, ds = _aggregate_gradient(k, v, a, g, table, m, r, here, scale, EXACT)
                dk = _dot(ds.to(k.dtype), a, dk)
                dv = _dot(p.to(k.dtype), g, dv)
        if WRITE:
            dv += _convolve(
                grad + b * g_b + h * D, g_n, weight, h * D, n, tokens, prefix, height, width,
                D, P, K, True,
            )  # fmt: skip
            place = dx + b * dx_b + (heads + h) * D + at * dx_n + d
            tl.store(place, (dk * scale).to(dx.dtype.element_ty), mask=ok)
            tl.store(place + heads * D, dv.to(dx.dtype.element_ty), mask=ok)
        b += 1
    if BIAS:
        part = (chunk * heads + h) * COUNT * tokens.to(tl.int64)
        tl.store(dbias + part + i[None, :] * tokens.to(tl.int64) + n[:, None], total, mask=here)


@triton.jit
def _of_cells(
    x, n, prefix, height, width, down, right,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The sum, for each token n, of the rows of x whose cells it is in: (tokens, P)."""
    d = tl.arange(0, P)[None, :]
    row = (n - prefix) // width
    column = (n - prefix) - row * width
    top = row * ROWS // height
    left = column * COLUMNS // width
    total = tl.zeros((n.shape[0], P), tl.float32)
    for step in range(0, down * right):
        i = top + step // right
        j = left + step % right
        ok = (n >= prefix) & (i < ROWS) & (i * height // ROWS <= row)
        ok = ok & (j < COLUMNS) & (j * width // COLUMNS <= column)
        pointers = x + (i * COLUMNS + j)[:, None] * D + d
        total += tl.load(pointers, mask=ok[:, None] & (d < D), other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=_SCALARS)
def _broadcast_token_gradient(
    x, grad, agents, values, dagents, bias, statistics, dx, dbias,
    x_b, x_n, g_b, g_n, dx_b, dx_n,
    bias_a, tokens, heads, height, width, prefix, batch, per_chunk, scale, down, right,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, COUNT: tl.constexpr, AGENTS: tl.constexpr,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    BIAS: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """dq if WRITE; if BIAS, one block of agents' dB2, summed over the images of a chunk."""
    h = tl.program_id(0)
    chunk = tl.program_id(2)
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    WHOLE: tl.constexpr = AGENTS >= COUNT
    BLOCKS: tl.constexpr = (COUNT + AGENTS - 1) // AGENTS
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = n < tokens
    d = tl.arange(0, P)[None, :]
    ok = valid[:, None] & (d < D)
    at = n.to(tl.int64)[:, None]
    i = tl.arange(0, AGENTS)
    bias += (heads + h).to(tl.int64) * COUNT * bias_a
    if BIAS:
        i += chunk % BLOCKS * AGENTS
        chunk //= BLOCKS
        live = (i < COUNT)[None, :]
        here = live & valid[:, None]
        table = _table(bias, i[None, :], n[:, None], bias_a, COUNT)
        total = tl.zeros((BLOCK, AGENTS), tl.float32)
    first = chunk * per_chunk
    b = first.to(tl.int64)
    for _image in range(first, tl.minimum(first + per_chunk, batch)):
        bh = b * heads + h
        q = tl.load(x + b * x_b + h * D + at * x_n + d, mask=ok, other=0.0)
        dy = tl.load(grad + b * g_b + h * D + at * g_n + d, mask=ok, other=0.0)
        softmax = statistics + bh * 2 * tokens
        if BIAS:
            a = _rows(agents + bh * (COUNT * D), i, COUNT, D, P)
            u = _rows(values + bh * (COUNT * D), i, COUNT, D, P).to(a.dtype)
            _p, ds = _broadcast_gradient(
                q, dy, a, u, table, live, valid, softmax, n, tokens, scale, WHOLE, EXACT
            )
            total += ds
            if WRITE:
                dq = _dot(ds.to(q.dtype), a, tl.zeros((BLOCK, P), tl.float32))
        else:
            dq = tl.zeros((BLOCK, P), tl.float32)
            for j in range(0, COUNT, AGENTS):
                live = (j + i < COUNT)[None, :]
                here = live & valid[:, None]
                table = _table(bias, (j + i)[None, :], n[:, None], bias_a, COUNT)
                a = _rows(agents + bh * (COUNT * D), j + i, COUNT, D, P)
                u = _rows(values + bh * (COUNT * D), j + i, COUNT, D, P).to(a.dtype)
                _p, ds = _broadcast_gradient(
                    q, dy, a, u, table, live, valid, softmax, n, tokens, scale, WHOLE, EXACT
                )
                dq = _dot(ds.to(q.dtype), a, dq)
        if WRITE:
            dq = dq * scale + _of_cells(
                dagents + bh * (COUNT * D), n, prefix, height, width, down, right,
                ROWS, COLUMNS, D, P,
            )  # fmt: skip
            place = dx + b * dx_b + h * D + at * dx_n + d
            tl.store(place, dq.to(dx.dtype.element_ty), mask=ok)
        b += 1
    if BIAS:
        part = (chunk * heads + h) * COUNT * tokens.to(tl.int64)
        tl.store(dbias + part + i[None, :] * tokens.to(tl.int64) + n[:, None], total, mask=here)


@dataclass(frozen=True)
class Blocks:
    """How many agents a program holds, and the tiles of the kernels that split the tokens and
    of those that run through the images."""

    agents: int
    split: Tile
    chunk: Tile


@lru_cache
def _blocks(count: int, padded: int, itemsize: int) -> Blocks:
    if itemsize == 4:
        # float32 multiplies without tensor cores, and holds its operands in registers.
        tile = Tile(16 if padded > 64 else 32, 8, 1, 2, 64)
        return Blocks(min(64, max(16, triton.next_power_of_2(count))), tile, tile)
    agents = triton.next_power_of_2(max(count, 16))
    if agents > 128:
        agents = 64
    large = agents > 64 or padded > 64
    # Chosen by registers and spills in the machine code.
    if large:
        chunk = Tile(32, 8, 1, 1, 64)
    else:
        chunk = Tile(64, 8 if agents > 16 else 4, 1, 1 if agents > 16 else 2, 64)
    return Blocks(agents, Tile(64, 8 if large else 4, 2, 1 if large else 2, 64), chunk)


def _aligned(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The biases in `dtype`, contiguous, their rows padded with zeros to a multiple of 16."""
    tokens = bias.shape[-1]
    if tokens % 16 == 0:
        return bias.to(dtype).contiguous()
    padded = bias.new_zeros(*bias.shape[:-1], triton.cdiv(tokens, 16) * 16, dtype=dtype)
    padded[..., :tokens] = bias
    return padded


class Problem:
    """One call's sizes, and the launch of each kernel."""

    def __init__(
        self,
        projection: Tensor,
        bias: Tensor,
        heads: int,
        size: tuple[int, int],
        grid: tuple[int, int],
    ):
        self.projection = projection
        self.bias = _aligned(bias, projection.dtype)
        self.bias_row = self.bias.shape[-1]
        self.heads = heads
        self.size = size
        self.grid = grid
        self.batch, self.tokens, packed = projection.shape
        self.width = packed // (3 * heads)
        self.padded = max(16, triton.next_power_of_2(self.width))
        self.rows = self.batch * heads
        self.count = grid[0] * grid[1]
        self.prefix = self.tokens - size[0] * size[1]
        self.scale = self.width**-0.5
        self.blocks = self.plan()
        self.agent_blocks = triton.cdiv(self.count, self.blocks.agents)
        self.strides = projection.stride()[:2]

    def plan(self) -> Blocks:
        return _blocks(self.count, self.padded, self.projection.element_size())

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.projection.device)

    def split(self, rows: int) -> tuple[int, int]:
        """Programs for each of `rows`, and tokens a program."""
        device = self.projection.device
        return split_tokens(self.blocks.split, rows, self.tokens, multiprocessors(device))

    def reach(self) -> list[int]:
        """Of how many rows and columns of agents one token can be in the cells."""
        return [
            max(1, cells // length)
            if length % cells == 0 or cells % length == 0
            # Cells that overlap, and the first of them at any place within a cell.
            else (cells - 1) // length + 2
            for length, cells in zip(self.size, self.grid, strict=True)
        ]

    def options(self, tile: Tile) -> dict:
        return {
            "COUNT": self.count,
            "AGENTS": self.blocks.agents,
            "D": self.width,
            "P": self.padded,
            "BLOCK": tile.block,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }

    def small(self) -> tuple[int, dict]:
        """Programs a head, and options, of the kernels that sum over splits."""
        rows = 4
        return triton.cdiv(self.count, rows), {
            "COUNT": self.count,
            "D": self.width,
            "P": self.padded,
            "ROWS": rows,
            "CHUNK": max(2, 2048 // (rows * self.padded)),
            "num_warps": 4,
        }

    def pool(self, agents: Tensor) -> None:
        channels = self.heads * self.width
        block = min(512, triton.next_power_of_2(channels))
        launch(
            _pool, (self.batch * self.count, triton.cdiv(channels, block)),
            self.projection, agents, *self.strides, *self.size, self.prefix, self.heads,
            D=self.width, ROWS=self.grid[0], COLUMNS=self.grid[1], CHANNELS=block,
            BLOCK=max(2, 2048 // block), num_warps=4,
        )  # fmt: skip

    def aggregate(self, agents: Tensor, values: Tensor, statistics: Tensor) -> None:
        splits, per_split = self.split(self.rows * self.agent_blocks)
        parts = (values, statistics)
        if splits > 1:
            parts = (
                self.empty(self.rows, splits, self.count, self.width),
                self.empty(self.rows, splits, 2, self.count),
            )
        launch(
            _aggregate, (self.rows, splits, self.agent_blocks),
            self.projection, agents, self.bias, *parts, *self.strides, self.bias_row,
            self.tokens, per_split, self.heads, self.scale, **self.options(self.blocks.split),
        )  # fmt: skip
        if splits > 1:
            programs, options = self.small()
            launch(_merge, (self.rows, programs), *parts, values, statistics, splits, **options)

    def broadcast(
        self,
        agents: Tensor,
        values: Tensor,
        weight: Tensor,
        weight_bias: Tensor | None,
        out: Tensor,
    ) -> None:
        splits, per_split = self.split(self.rows)
        launch(
            _broadcast, (self.rows, splits),
            self.projection, agents, values, self.bias, weight,
            weight if weight_bias is None else weight_bias, out, *self.strides, self.bias_row,
            self.tokens, per_split, self.heads, *self.size, self.prefix, self.scale,
            K=weight.shape[-1], WEIGHT_BIAS=weight_bias is not None,
            **self.options(self.blocks.split),
        )  # fmt: skip

    def broadcast_statistics(self, grad: Tensor, agents: Tensor, values: Tensor) -> Tensor:
        """Of the softmax over more agents than one block; else empty, and not read."""
        if self.agent_blocks == 1:
            return values
        statistics = self.empty(self.rows, 2, self.tokens)
        splits, per_split = self.split(self.rows)
        launch(
            _broadcast_statistics, (self.rows, splits),
            self.projection, grad, agents, values, self.bias, statistics,
            *self.strides, *grad.stride()[:2], self.bias_row, self.tokens, per_split, self.heads,
            self.scale, **self.options(self.blocks.split),
        )  # fmt: skip
        return statistics

    def finish(
        self, parts: Tensor, values: Tensor, statistics: Tensor, agent: bool
    ) -> tuple[Tensor, Tensor]:
        gradient = self.empty(self.rows, self.count, self.width, dtype=self.projection.dtype)
        inner = gradient if agent else self.empty(self.rows, self.count)
        programs, options = self.small()
        launch(
            _finish, (self.rows, programs),
            parts, values, statistics, gradient, inner, parts.shape[1], *self.size,
            COLUMNS=self.grid[1], AGENT=agent, **options,
        )  # fmt: skip
        return gradient, inner

    def agent_gradients(
        self, grad: Tensor, agents: Tensor, values: Tensor, statistics: Tensor, softmax: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """da, ready for the tokens of each cell; du / sum, and its products with u."""
        splits, per_split = self.split(self.rows * self.agent_blocks)
        shape = (self.rows, splits, self.count, self.width)
        agent_parts = self.empty(self.rows, 2 * splits, *shape[2:])
        value_parts = self.empty(*shape)
        grid = (self.rows, splits, self.agent_blocks)
        options = self.options(self.blocks.split)
        sizes = (
            self.bias_row, self.tokens, per_split, self.heads, self.scale, agent_parts.stride(0),
        )  # fmt: skip
        launch(
            _broadcast_agent_gradient, grid,
            self.projection, grad, agents, values, self.bias, softmax, agent_parts, value_parts,
            *self.strides, *grad.stride()[:2], *sizes, **options,
        )  # fmt: skip
        slopes, inner = self.finish(value_parts, values, statistics, agent=False)
        launch(
            _aggregate_agent_gradient, grid,
            self.projection, agents, slopes, self.bias, statistics, inner, agent_parts[:, splits:],
            *self.strides, *sizes, **options,
        )  # fmt: skip
        return self.finish(agent_parts, values, statistics, agent=True)[0], slopes, inner

    def token_gradients(self, launches: tuple) -> Tensor:
        """Run each `launch(grid, parts, per_chunk, options)` for every token and every bias; return
        the biases' gradient."""
        tile = self.blocks.chunk
        grid = (self.heads, triton.cdiv(self.tokens, tile.block))
        wanted = tile.resident * multiprocessors(self.projection.device)
        chunks = max(1, min(self.batch, wanted // (grid[0] * grid[1] * self.agent_blocks)))
        per_chunk = triton.cdiv(self.batch, chunks)
        chunks = triton.cdiv(self.batch, per_chunk)
        parts = self.empty(2, chunks, self.heads, self.count, self.tokens)
        whole = self.agent_blocks == 1
        options = self.options(tile)
        for run, part in zip(launches, parts, strict=True):
            run(
                (*grid, chunks * self.agent_blocks), part, per_chunk,
                {"BIAS": True, "WRITE": whole, **options},
            )  # fmt: skip
            if not whole:
                run((*grid, self.batch), part, 1, {"BIAS": False, "WRITE": True, **options})
        return parts.sum(1)


def forward(
    problem: Problem,
    weight: Tensor,
    weight_bias: Tensor | None,
    out: Tensor,
    agents: Tensor,
    values: Tensor,
    statistics: Tensor,
) -> None:
    """Write the result to `out`, and what `backward` needs to the others."""
    problem.pool(agents)
    problem.aggregate(agents, values, statistics)
    problem.broadcast(agents, values, weight, weight_bias, out)


def backward(
    problem: Problem,
    grad: Tensor,
    weight: Tensor,
    agents: Tensor,
    values: Tensor,
    statistics: Tensor,
    total: Tensor,
) -> Tensor:
    """Write the projection's gradient to `total`; return that of the bias, in float32."""
    softmax = problem.broadcast_statistics(grad, agents, values)
    dagents, slopes, inner = problem.agent_gradients(grad, agents, values, statistics, softmax)
    strides = (*problem.strides, *grad.stride()[:2], *total.stride()[:2])

    def sizes(per_chunk: int) -> tuple:
        return (
            problem.bias_row, problem.tokens, problem.heads, *problem.size, problem.prefix,
            problem.batch, per_chunk, problem.scale,
        )  # fmt: skip

    def aggregate(grid: tuple, parts: Tensor, per_chunk: int, options: dict) -> None:
        launch(
            _aggregate_token_gradient, grid,
            problem.projection, grad, agents, slopes, problem.bias, statistics, inner, weight,
            total, parts, *strides, *sizes(per_chunk), K=weight.shape[-1], **options,
        )  # fmt: skip

    def broadcast(grid: tuple, parts: Tensor, per_chunk: int, options: dict) -> None:
        launch(
            _broadcast_token_gradient, grid,
            problem.projection, grad, agents, values, dagents, problem.bias, softmax,
            total, parts, *strides, *sizes(per_chunk), *problem.reach(),
            ROWS=problem.grid[0], COLUMNS=problem.grid[1], **options,
        )  # fmt: skip

    return problem.token_gradients((aggregate, broadcast))
