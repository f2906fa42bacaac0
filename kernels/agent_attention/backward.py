"""The backward kernels of `agent_attention`; `plan.py` has their order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from ..runtime.mathematics import multiply, shrinkage, single
from .forward import align_rows
from .mathematics import (
    NEVER,
    SCALARS,
    agent_rows,
    bias_tile,
    convolve,
    scores_of,
    softmax_of,
    softmax_weights,
)
from .plan import Plan


@triton.jit(do_not_specialize=SCALARS)
def _broadcast_statistics(
    x, grad, agents, values, bias, statistics,
    x_b, x_n, g_b, g_n, bias_a, tokens, per_split, heads, scale,
    COUNT: tl.constexpr, AGENTS: tl.constexpr,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per token, the logarithm of the sum of the softmax over many agents, and sum(p dp)."""
    scale = single(scale)
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
            a = agent_rows(agents, j + i, COUNT, D, P)
            u = agent_rows(values, j + i, COUNT, D, P).to(a.dtype)
            table = bias_tile(bias, (j + i)[None, :], n[:, None], bias_a, COUNT)
            s = scores_of(q, a, table, scale)
            s = tl.where(live, s, NEVER)
            higher = tl.maximum(maximum, tl.max(s, 1))
            shrink = shrinkage(maximum, higher, EXACT)
            p = softmax_weights(s, higher[:, None], live, EXACT)
            dp = multiply(dy, tl.trans(u))
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
    s = scores_of(q, a, bias, scale)
    dp = multiply(dy, tl.trans(u))
    if WHOLE:
        p = softmax_of(s, live, EXACT)
        # The sum is over the same dp that it is subtracted from: of a one-hot softmax all is exact.
        inner = tl.sum(p * dp, 1)
    else:
        p = softmax_weights(s, tl.load(statistics + n, mask=valid, other=0.0)[:, None], live, EXACT)
        inner = tl.load(statistics + tokens + n, mask=valid, other=0.0)
    return p, p * (dp - inner[:, None])


@triton.jit(do_not_specialize=SCALARS)
def _broadcast_agent_gradient(
    x, grad, agents, values, bias, statistics, agent_parts, value_parts,
    x_b, x_n, g_b, g_n, bias_a, tokens, per_split, heads, scale, part_stride,
    COUNT: tl.constexpr, AGENTS: tl.constexpr,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    scale = single(scale)
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
    a = agent_rows(agents + bh * (COUNT * D), i, COUNT, D, P)
    u = agent_rows(values + bh * (COUNT * D), i, COUNT, D, P).to(a.dtype)
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
        table = bias_tile(bias, i[None, :], n[:, None], bias_a, COUNT)
        p, ds = _broadcast_gradient(
            q, dy, a, u, table, live, valid, statistics, n, tokens, scale, WHOLE, EXACT
        )
        # The dy and q of a missing token are zero.
        du = multiply(tl.trans(p.to(q.dtype)), dy, du)
        da = multiply(tl.trans(ds.to(q.dtype)), q, da)
    ok = (i < COUNT)[:, None] & (d < D)
    place = split * (COUNT * D) + i[:, None] * D + d
    tl.store(agent_parts + bh * part_stride + place, da * scale, mask=ok)
    tl.store(value_parts + bh * tl.num_programs(1) * (COUNT * D) + place, du, mask=ok)


@triton.jit(do_not_specialize=SCALARS)
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


@triton.jit(do_not_specialize=SCALARS)
def _aggregate_agent_gradient(
    x, agents, slopes, bias, statistics, inner, parts,
    x_b, x_n, bias_a, tokens, per_split, heads, scale, part_stride,
    COUNT: tl.constexpr, AGENTS: tl.constexpr,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    scale = single(scale)
    bh = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    h = bh % heads
    x += bh // heads * x_b + (heads + h) * D
    d = tl.arange(0, P)[None, :]
    i = tl.program_id(2) * AGENTS + tl.arange(0, AGENTS)
    live = i < COUNT
    a = agent_rows(agents + bh * (COUNT * D), i, COUNT, D, P)
    g = agent_rows(slopes + bh * (COUNT * D), i, COUNT, D, P)
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
        s = scores_of(a, k, bias_tile(bias, i[:, None], n[None, :], bias_a, COUNT), scale)
        p = softmax_weights(s, maximum, here, EXACT)
        dp = multiply(g, tl.trans(v))
        da = multiply((p * (dp - subtracted)).to(k.dtype), k, da)
    ok = live[:, None] & (d < D)
    parts += bh * part_stride + split * (COUNT * D)
    tl.store(parts + i[:, None] * D + d, da * scale, mask=ok)


@triton.jit
def _aggregate_gradient(
    k, v, a, g, bias, maximum, inner, here, scale, EXACT: tl.constexpr
):  # fmt: skip
    """p times its softmax's sum, and ds, of the softmax over tokens, (tokens, agents)."""
    p = softmax_weights(scores_of(k, a, bias, scale), maximum[None, :], here, EXACT)
    dp = multiply(v, tl.trans(g))
    return p, p * (dp - inner[None, :])


@triton.jit(do_not_specialize=SCALARS)
def _aggregate_token_gradient(
    x, grad, agents, slopes, bias, statistics, inner, weight, dx, dbias,
    x_b, x_n, g_b, g_n, dx_b, dx_n,
    bias_a, tokens, heads, height, width, prefix, batch, per_chunk, scale,
    COUNT: tl.constexpr, AGENTS: tl.constexpr,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr,
    BIAS: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """dk and dv if WRITE; if BIAS, one block of agents' dB1, summed over the images of a chunk."""
    scale = single(scale)
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
        table = bias_tile(bias, i[None, :], n[:, None], bias_a, COUNT)
        total = tl.zeros((BLOCK, AGENTS), tl.float32)
    first = chunk * per_chunk
    b = first.to(tl.int64)
    for _image in range(first, tl.minimum(first + per_chunk, batch)):
        bh = b * heads + h
        key = x + b * x_b + (heads + h) * D + at * x_n + d
        k = tl.load(key, mask=ok, other=0.0)
        v = tl.load(key + heads * D, mask=ok, other=0.0)
        if BIAS:
            a = agent_rows(agents + bh * (COUNT * D), i, COUNT, D, P)
            g = agent_rows(slopes + bh * (COUNT * D), i, COUNT, D, P)
            m = tl.load(statistics + bh * (2 * COUNT) + i, mask=live, other=0.0)
            r = tl.load(inner + bh * COUNT + i, mask=live, other=0.0)
            p, ds = _aggregate_gradient(k, v, a, g, table, m, r, here, scale, EXACT)
            total += ds
            if WRITE:
                dk = multiply(ds.to(k.dtype), a)
                dv = multiply(p.to(k.dtype), g)
        else:
            dk = tl.zeros((BLOCK, P), tl.float32)
            dv = tl.zeros((BLOCK, P), tl.float32)
            for j in range(0, COUNT, AGENTS):
                live = j + i < COUNT
                here = live[None, :] & valid[:, None]
                table = bias_tile(bias, (j + i)[None, :], n[:, None], bias_a, COUNT)
                a = agent_rows(agents + bh * (COUNT * D), j + i, COUNT, D, P)
                g = agent_rows(slopes + bh * (COUNT * D), j + i, COUNT, D, P)
                m = tl.load(statistics + bh * (2 * COUNT) + j + i, mask=live, other=0.0)
                r = tl.load(inner + bh * COUNT + j + i, mask=live, other=0.0)
                p, ds = _aggregate_gradient(k, v, a, g, table, m, r, here, scale, EXACT)
                dk = multiply(ds.to(k.dtype), a, dk)
                dv = multiply(p.to(k.dtype), g, dv)
        if WRITE:
            dv += convolve(
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


@triton.jit(do_not_specialize=SCALARS)
def _broadcast_token_gradient(
    x, grad, agents, values, dagents, bias, statistics, dx, dbias,
    x_b, x_n, g_b, g_n, dx_b, dx_n,
    bias_a, tokens, heads, height, width, prefix, batch, per_chunk, scale, down, right,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, COUNT: tl.constexpr, AGENTS: tl.constexpr,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    BIAS: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """dq if WRITE; if BIAS, one block of agents' dB2, summed over the images of a chunk."""
    scale = single(scale)
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
        table = bias_tile(bias, i[None, :], n[:, None], bias_a, COUNT)
        total = tl.zeros((BLOCK, AGENTS), tl.float32)
    first = chunk * per_chunk
    b = first.to(tl.int64)
    for _image in range(first, tl.minimum(first + per_chunk, batch)):
        bh = b * heads + h
        q = tl.load(x + b * x_b + h * D + at * x_n + d, mask=ok, other=0.0)
        dy = tl.load(grad + b * g_b + h * D + at * g_n + d, mask=ok, other=0.0)
        softmax = statistics + bh * 2 * tokens
        if BIAS:
            a = agent_rows(agents + bh * (COUNT * D), i, COUNT, D, P)
            u = agent_rows(values + bh * (COUNT * D), i, COUNT, D, P).to(a.dtype)
            _p, ds = _broadcast_gradient(
                q, dy, a, u, table, live, valid, softmax, n, tokens, scale, WHOLE, EXACT
            )
            total += ds
            if WRITE:
                dq = multiply(ds.to(q.dtype), a)
        else:
            dq = tl.zeros((BLOCK, P), tl.float32)
            for j in range(0, COUNT, AGENTS):
                live = (j + i < COUNT)[None, :]
                here = live & valid[:, None]
                table = bias_tile(bias, (j + i)[None, :], n[:, None], bias_a, COUNT)
                a = agent_rows(agents + bh * (COUNT * D), j + i, COUNT, D, P)
                u = agent_rows(values + bh * (COUNT * D), j + i, COUNT, D, P).to(a.dtype)
                _p, ds = _broadcast_gradient(
                    q, dy, a, u, table, live, valid, softmax, n, tokens, scale, WHOLE, EXACT
                )
                dq = multiply(ds.to(q.dtype), a, dq)
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


def backward(
    how: Plan,
    projection: Tensor,
    bias: Tensor,
    grad: Tensor,
    weight: Tensor,
    agents: Tensor,
    values: Tensor,
    statistics: Tensor,
    total: Tensor,
) -> Tensor:
    """Write the projection's gradient to `total`; return that of the biases, in float32."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=projection.device)

    bias = align_rows(bias, projection.dtype)
    strides = projection.stride()[:2]
    both = (*strides, *grad.stride()[:2])
    softmax = values  # which the kernels do not read
    if how.has_statistics:
        softmax = empty(how.rows, 2, how.tokens)
        launch(
            _broadcast_statistics, how.broadcast_statistics,
            projection, grad, agents, values, bias, softmax, *both,
        )  # fmt: skip
    shape = (how.count, how.width)
    agent_parts = empty(how.rows, 2 * how.splits, *shape)
    value_parts = empty(how.rows, how.splits, *shape)
    launch(
        _broadcast_agent_gradient, how.broadcast_agent_gradient,
        projection, grad, agents, values, bias, softmax, agent_parts, value_parts, *both,
    )  # fmt: skip
    # du / sum, and its products with u.
    slopes, inner = empty(how.rows, *shape, dtype=projection.dtype), empty(how.rows, how.count)
    launch(_finish, how.finish_values, value_parts, values, statistics, slopes, inner)
    launch(
        _aggregate_agent_gradient, how.aggregate_agent_gradient,
        projection, agents, slopes, bias, statistics, inner, agent_parts[:, how.splits :], *strides,
    )  # fmt: skip
    # da, ready for the tokens of each cell.
    dagents = empty(how.rows, *shape, dtype=projection.dtype)
    launch(_finish, how.finish_agents, agent_parts, values, statistics, dagents, dagents)
    bias_parts = empty(*how.bias_parts)
    strides = (*both, *total.stride()[:2])
    for token_gradient in how.aggregate_token_gradient:
        launch(
            _aggregate_token_gradient, token_gradient,
            projection, grad, agents, slopes, bias, statistics, inner, weight, total,
            bias_parts[0], *strides,
        )  # fmt: skip
    for token_gradient in how.broadcast_token_gradient:
        launch(
            _broadcast_token_gradient, token_gradient,
            projection, grad, agents, values, dagents, bias, softmax, total, bias_parts[1],
            *strides,
        )  # fmt: skip
    return bias_parts.sum(1)
