"""The backward kernels of `flow_attention`; `plan.py` has their order.

With t_i = S dy_i, u_j = dS v_j, A = sigmoid(a) I and w of `plan.py`,

    da_i = I_i sigmoid'(a_i) q_i . t_i             dS = sum A_i q_i^T dy_i
    dI_i = sigmoid(a_i) q_i . t_i + q_i . d(sum I q)
    dc_j = w_j (k_j . u_j - <S, dS> / N), where the flow is below its cut-off
    dO_j = k_j . d(sum O k)

and the gradient of the flow to q_i from sum k is -I_i^2 dI_i, that of the flow to k_j from sum q
-O_j^2 dO_j. A flow with the gradient g gives g (t + e) to its token, and g (x + e) to its total.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..linear_attention.mathematics import sum_splits
from ..runtime.launch import launch
from ..runtime.mathematics import dot, dot_halves, exponential, fold, high_part, low_part, operand
from .forward import join_heads, merge, strides_of
from .mathematics import (
    ABSENT,
    EPSILON,
    SCALARS,
    flow,
    head_sums,
    load_blocks,
    locate,
    prepare_flow,
    sigmoid,
    spread,
)
from .plan import plan


@triton.jit(do_not_specialize=SCALARS)
def _output_gradient(
    q, go, state, parts, q_b, q_n, go_b, go_n,
    tokens, per_split, heads,
    D: tl.constexpr, W: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """dS, d sum O k and <S, dS> of this program's tokens."""
    EXACT: tl.constexpr = go.dtype.element_ty == tl.float32
    b, d, live = locate(heads, D, W, P)
    q += b * q_b
    go += b * go_b
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    c = tl.arange(0, P)
    e = c[:, None]
    state += row * (W + 5) * P
    sums = state + W * P + c[None, :]
    s = load_blocks(state, c[None, :], e, W, P) * (tokens / tl.load(sums))
    s_high = high_part(s, EXACT)
    s_low = low_part(s, EXACT)
    keys, least_in = prepare_flow(tl.load(sums + 2 * P), live, W)
    sources, least = prepare_flow(tl.load(sums + 3 * P), live, W)
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    source_sum = tl.zeros((FOLD, P), tl.float32)
    inner = tl.zeros((BLOCK, P // W), tl.float32)
    dstate = tl.zeros((P, P), tl.float32)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        ok = (n < last)[:, None] & live
        at = n.to(tl.int64)[:, None]
        query = tl.load(q + at * q_n + d, mask=ok, other=ABSENT).to(tl.float32)
        dy = operand(tl.load(go + at * go_n + d, mask=ok, other=0.0), EXACT)
        query = sigmoid(query, EXACT)
        incoming = 1.0 / flow(query, keys, least_in, W)
        allocated = sigmoid(flow(query, sources, least, W), EXACT)
        t = dot_halves(dy, s_high, s_low, tl.zeros((BLOCK, P), tl.float32), EXACT)
        dfactor = head_sums(query * t, W)
        factor = allocated * incoming
        inner += factor * dfactor
        dallocated = dfactor * factor * (1.0 - allocated)
        source_sum += fold(spread(dallocated, W) * (query + EPSILON), FOLD)
        dstate = dot(tl.trans(dy), query * spread(factor, W), dstate, EXACT)
    parts += (row * tl.num_programs(1) + split) * (W + 2) * P
    tl.store(parts + e % W * P + c[None, :], dstate, mask=e // W == c[None, :] // W)
    tl.store(parts + W * P + c, tl.sum(source_sum, 0))
    tl.store(parts + W * P + P + c, tl.sum(spread(inner, W), 0))


@triton.jit
def _load_source_gradients(state, dtotal, tokens, live, W: tl.constexpr, P: tl.constexpr):
    """What `_differentiate_source` takes besides a tile of keys and values."""
    c = tl.arange(0, P)[None, :]
    head = tl.arange(0, P // W)[None, :] * W
    sums = state + W * P
    queries, least_out = prepare_flow(tl.load(sums + P + c), live, W)
    sinks, least = prepare_flow(tl.load(sums + 4 * P + c), live, W)
    weight = tokens / tl.load(sums + head)
    dsources = tl.load(dtotal + W * P + c)
    inner = tl.load(dtotal + W * P + P + head) / tokens
    return queries, least_out, sinks, least, weight, dsources, inner


@triton.jit
def _differentiate_source(
    key, u, valid, queries, least_out, sinks, least, weight, dsources, inner,
    W: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Of each key its weight w, dc, O, and the gradient of the flow to it from sum q."""
    conserved = flow(key, sinks, least, W)
    weight = weight * exponential(tl.minimum(conserved, 1.0), EXACT)
    dconserved = weight * (head_sums(key * u, W) - inner)
    dconserved = tl.where(valid & (conserved < 1.0), dconserved, 0.0)
    outgoing = 1.0 / flow(key, queries, least_out, W)
    return weight, dconserved, outgoing, -outgoing * outgoing * head_sums(key * dsources, W)


@triton.jit(do_not_specialize=SCALARS)
def _value_gradient(
    k, v, state, dtotal, dv, parts, k_b, k_n, v_b, v_n, dv_b, dv_n,
    tokens, per_split, heads,
    D: tl.constexpr, W: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """dv; and d sum I q and d sum q of this program's tokens."""
    EXACT: tl.constexpr = k.dtype.element_ty == tl.float32
    b, d, live = locate(heads, D, W, P)
    k += b * k_b
    v += b * v_b
    dv += b * dv_b
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    c = tl.arange(0, P)
    state += row * (W + 5) * P
    dtotal += row * (W + 2) * P
    queries, least_out, sinks, least, weights, dsources, inner = _load_source_gradients(
        state, dtotal, tokens, live, W, P
    )
    ds = load_blocks(dtotal, c[:, None], c[None, :], W, P)
    ds_high = high_part(ds, EXACT)
    ds_low = low_part(ds, EXACT)
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    sink_sum = tl.zeros((FOLD, P), tl.float32)
    query_sum = tl.zeros((FOLD, P), tl.float32)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        valid = (n < last)[:, None]
        ok = valid & live
        at = n.to(tl.int64)[:, None]
        key = tl.load(k + at * k_n + d, mask=ok, other=ABSENT).to(tl.float32)
        value = operand(tl.load(v + at * v_n + d, mask=ok, other=0.0), EXACT)
        key = sigmoid(key, EXACT)
        zeros = tl.zeros((BLOCK, P), tl.float32)
        u = dot_halves(value, tl.trans(ds_high), tl.trans(ds_low), zeros, EXACT)
        weight, dconserved, outgoing, dout = _differentiate_source(
            key, u, valid, queries, least_out, sinks, least, weights, dsources, inner, W, EXACT
        )
        sink_sum += fold(spread(dconserved, W) * (key + EPSILON), FOLD)
        query_sum += fold(spread(dout, W) * (key + EPSILON), FOLD)
        y = dot_halves(key, ds_high, ds_low, zeros, EXACT) * spread(weight, W)
        tl.store(dv + at * dv_n + d, y.to(dv.dtype.element_ty), mask=ok)
    splits = tl.num_programs(1)
    parts += (row * 2 * splits + split) * P + c
    tl.store(parts, tl.sum(sink_sum, 0))
    tl.store(parts + splits * P, tl.sum(query_sum, 0))


@triton.jit(do_not_specialize=SCALARS)
def _query_gradient(
    q, go, state, value_parts, dq, parts, q_b, q_n, go_b, go_n, dq_b, dq_n,
    tokens, per_split, heads, splits,
    D: tl.constexpr, W: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """dq; and d sum k of this program's tokens."""
    EXACT: tl.constexpr = go.dtype.element_ty == tl.float32
    b, d, live = locate(heads, D, W, P)
    q += b * q_b
    go += b * go_b
    dq += b * dq_b
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    c = tl.arange(0, P)
    state += row * (W + 5) * P
    sums = state + W * P + c[None, :]
    s = load_blocks(state, c[None, :], c[:, None], W, P) * (tokens / tl.load(sums))
    s_high = high_part(s, EXACT)
    s_low = low_part(s, EXACT)
    keys, least_in = prepare_flow(tl.load(sums + 2 * P), live, W)
    sources, least = prepare_flow(tl.load(sums + 3 * P), live, W)
    value_parts += row * 2 * splits * P
    dsinks = sum_splits(value_parts, splits, P)[None, :]
    dqueries = sum_splits(value_parts + splits * P, splits, P)[None, :]
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    key_sum = tl.zeros((FOLD, P), tl.float32)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        ok = (n < last)[:, None] & live
        at = n.to(tl.int64)[:, None]
        query = tl.load(q + at * q_n + d, mask=ok, other=ABSENT).to(tl.float32)
        dy = operand(tl.load(go + at * go_n + d, mask=ok, other=0.0), EXACT)
        query = sigmoid(query, EXACT)
        incoming = 1.0 / flow(query, keys, least_in, W)
        allocated = sigmoid(flow(query, sources, least, W), EXACT)
        t = dot_halves(dy, s_high, s_low, tl.zeros((BLOCK, P), tl.float32), EXACT)
        dfactor = head_sums(query * t, W)
        factor = allocated * incoming
        dallocated = dfactor * factor * (1.0 - allocated)
        din = dfactor * allocated + head_sums(query * dsinks, W)
        din *= -incoming * incoming
        key_sum += fold(spread(din, W) * (query + EPSILON), FOLD)
        t = t * spread(factor, W) + dqueries + spread(dallocated, W) * sources
        t += spread(incoming, W) * dsinks + spread(din, W) * keys
        t *= query * (1.0 - query)
        tl.store(dq + at * dq_n + d, t.to(dq.dtype.element_ty), mask=ok)
    parts += (row * tl.num_programs(1) + split) * P
    tl.store(parts + c, tl.sum(key_sum, 0))


@triton.jit(do_not_specialize=SCALARS)
def _key_gradient(
    k, v, state, dtotal, query_parts, dk, k_b, k_n, v_b, v_n, dk_b, dk_n,
    tokens, per_split, heads, splits,
    D: tl.constexpr, W: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = k.dtype.element_ty == tl.float32
    b, d, live = locate(heads, D, W, P)
    k += b * k_b
    v += b * v_b
    dk += b * dk_b
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    c = tl.arange(0, P)
    state += row * (W + 5) * P
    dtotal += row * (W + 2) * P
    queries, least_out, sinks, least, weights, dsources, inner = _load_source_gradients(
        state, dtotal, tokens, live, W, P
    )
    ds = load_blocks(dtotal, c[None, :], c[:, None], W, P)
    ds_high = high_part(ds, EXACT)
    ds_low = low_part(ds, EXACT)
    dkeys = sum_splits(query_parts + row * splits * P, splits, P)[None, :]
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        valid = (n < last)[:, None]
        ok = valid & live
        at = n.to(tl.int64)[:, None]
        key = tl.load(k + at * k_n + d, mask=ok, other=ABSENT).to(tl.float32)
        value = operand(tl.load(v + at * v_n + d, mask=ok, other=0.0), EXACT)
        key = sigmoid(key, EXACT)
        u = dot_halves(value, ds_high, ds_low, tl.zeros((BLOCK, P), tl.float32), EXACT)
        weight, dconserved, outgoing, dout = _differentiate_source(
            key, u, valid, queries, least_out, sinks, least, weights, dsources, inner, W, EXACT
        )
        u = u * spread(weight, W) + dkeys + spread(dconserved, W) * sinks
        u += spread(outgoing, W) * dsources + spread(dout, W) * queries
        u *= key * (1.0 - key)
        tl.store(dk + at * dk_n + d, u.to(dk.dtype.element_ty), mask=ok)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
) -> None:
    """Write the gradients of query, key and value."""
    how = plan(query.shape, query.dtype, query.device)
    tensors = tuple(map(join_heads, (grad, query, key, value, dquery, dkey, dvalue)))
    grad, query, key, value, dquery, dkey, dvalue = tensors
    go, q, k, v, dq, dk, dv = map(strides_of, tensors)
    parts = how.empty(query, how.output_gradient.grid[1], how.padded + 2)
    launch(_output_gradient, how.output_gradient, query, grad, state, parts, *q, *go)
    dtotal = how.empty(query, how.padded + 2)
    launch(merge, how.merge_gradient, parts, dtotal)
    value_parts = how.empty(query, 2, how.value_gradient.grid[1])
    launch(
        _value_gradient, how.value_gradient,
        key, value, state, dtotal, dvalue, value_parts, *k, *v, *dv,
    )  # fmt: skip
    query_parts = how.empty(query, how.query_gradient.grid[1])
    launch(
        _query_gradient, how.query_gradient,
        query, grad, state, value_parts, dquery, query_parts, *q, *go, *dq,
    )  # fmt: skip
    launch(
        _key_gradient, how.key_gradient,
        key, value, state, dtotal, query_parts, dkey, *k, *v, *dk,
    )  # fmt: skip
