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

from ..linear_attention.mathematics import fold_sums, sum_splits
from ..runtime.launch import launch
from ..runtime.mathematics import dot, dot_halves, exponential, fold, high_part, low_part, operand
from .forward import flatten_heads, merge, strides_of
from .mathematics import (
    ABSENT,
    EPSILON,
    SCALARS,
    flow,
    join_heads,
    load_blocks,
    locate,
    once,
    prepare_flow,
    sigmoid,
    split_heads,
)
from .plan import plan


@triton.jit(do_not_specialize=SCALARS)
def _output_gradient(
    q, go, state, parts, q_b, q_n, go_b, go_n,
    tokens, per_split, heads,
    D: tl.constexpr, W: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dS and d sum O k of this program's tokens."""
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
    source_sum = tl.zeros((BLOCK // 2, P), tl.float32)
    dstate = tl.zeros((P, P), tl.float32)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        ok = (n < last)[:, None] & live
        at = n.to(tl.int64)[:, None]
        query = tl.load(q + at * q_n + d, mask=ok, other=ABSENT)
        dy = operand(tl.load(go + at * go_n + d, mask=ok, other=0.0), EXACT)
        query = split_heads(once(sigmoid(query, EXACT)), W)
        incoming = 1.0 / flow(query, keys, least_in)
        allocated = sigmoid(flow(query, sources, least), EXACT)
        t = dot_halves(dy, s_high, s_low, tl.zeros((BLOCK, P), tl.float32), EXACT)
        t = split_heads(t, W)
        dfactor = tl.sum(query * t, 2)
        factor = allocated * incoming
        dallocated = dfactor * factor * (1.0 - allocated)
        source_sum += fold_sums(join_heads(dallocated[:, :, None] * (query + EPSILON)))
        dstate = dot(tl.trans(dy), join_heads(query * factor[:, :, None]), dstate, EXACT)
    parts += (row * tl.num_programs(1) + split) * (W + 1) * P
    tl.store(parts + e % W * P + c[None, :], dstate, mask=e // W == c[None, :] // W)
    tl.store(parts + W * P + c, tl.sum(source_sum, 0))


@triton.jit
def _load_sources(state, dtotal, live, W: tl.constexpr, P: tl.constexpr):
    """The flows' totals that keys are multiplied with, d sum O k, 1 / Z and <S, dS> / N."""
    c = tl.arange(0, P)[None, :]
    sums = state + W * P
    queries, least_out = prepare_flow(tl.load(sums + P + c), live, W)
    sinks, least = prepare_flow(tl.load(sums + 4 * P + c), live, W)
    dsources = split_heads(tl.load(dtotal + W * P + c), W)
    inverse = 1.0 / tl.load(sums + tl.arange(0, P // W)[None, :] * W)
    block = tl.arange(0, W)[:, None] * P + c
    inner = tl.sum(tl.load(state + block) * tl.load(dtotal + block), 0)[None, :]
    inner = tl.sum(split_heads(inner, W), 2) * inverse
    return queries, least_out, sinks, least, dsources, inverse, inner


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
    dtotal += row * (W + 1) * P
    queries, least_out, sinks, least, dsources, inverse, inner = _load_sources(
        state, dtotal, live, W, P
    )
    ds = load_blocks(dtotal, c[:, None], c[None, :], W, P)
    ds_high = high_part(ds, EXACT)
    ds_low = low_part(ds, EXACT)
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    sink_sum = tl.zeros((BLOCK // 2, P), tl.float32)
    query_sum = tl.zeros((FOLD, P), tl.float32)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        valid = (n < last)[:, None]
        ok = valid & live
        at = n.to(tl.int64)[:, None]
        key = tl.load(k + at * k_n + d, mask=ok, other=ABSENT)
        value = operand(tl.load(v + at * v_n + d, mask=ok, other=0.0), EXACT)
        key = split_heads(once(sigmoid(key, EXACT)), W)
        zeros = tl.zeros((BLOCK, P), tl.float32)
        conserved = flow(key, sinks, least)
        weight = tokens * inverse * exponential(tl.minimum(conserved, 1.0), EXACT)
        y = dot_halves(join_heads(key * weight[:, :, None]), ds_high, ds_low, zeros, EXACT)
        tl.store(dv + at * dv_n + d, y.to(dv.dtype.element_ty), mask=ok)
        outgoing = 1.0 / flow(key, queries, least_out)
        dout = -outgoing * outgoing * tl.sum(key * dsources, 2)
        query_sum += fold(join_heads(dout[:, :, None] * (key + EPSILON)), FOLD)
        u = dot_halves(value, tl.trans(ds_high), tl.trans(ds_low), zeros, EXACT)
        dconserved = weight * (tl.sum(key * split_heads(u, W), 2) - inner)
        dconserved = tl.where(valid & (conserved < 1.0), dconserved, 0.0)
        sink_sum += fold_sums(join_heads(dconserved[:, :, None] * (key + EPSILON)))
    splits = tl.num_programs(1)
    parts += (row * 2 * splits + split) * P + c
    tl.store(parts, tl.sum(sink_sum, 0))
    tl.store(parts + splits * P, tl.sum(query_sum, 0))


@triton.jit(do_not_specialize=SCALARS)
def _query_gradient(
    q, go, state, value_parts, dq, parts, q_b, q_n, go_b, go_n, dq_b, dq_n,
    tokens, per_split, heads, splits,
    D: tl.constexpr, W: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
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
    dsinks = split_heads(sum_splits(value_parts, splits, P)[None, :], W)
    dqueries = split_heads(sum_splits(value_parts + splits * P, splits, P)[None, :], W)
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    key_sum = tl.zeros((BLOCK // 2, P), tl.float32)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        ok = (n < last)[:, None] & live
        at = n.to(tl.int64)[:, None]
        query = tl.load(q + at * q_n + d, mask=ok, other=ABSENT)
        dy = operand(tl.load(go + at * go_n + d, mask=ok, other=0.0), EXACT)
        query = split_heads(sigmoid(query, EXACT), W)
        incoming = 1.0 / flow(query, keys, least_in)
        allocated = sigmoid(flow(query, sources, least), EXACT)
        t = dot_halves(dy, s_high, s_low, tl.zeros((BLOCK, P), tl.float32), EXACT)
        t = split_heads(t, W)
        dfactor = tl.sum(query * t, 2)
        factor = allocated * incoming
        dallocated = dfactor * factor * (1.0 - allocated)
        din = dfactor * allocated + tl.sum(query * dsinks, 2)
        din *= -incoming * incoming
        key_sum += fold_sums(join_heads(din[:, :, None] * (query + EPSILON)))
        t = t * factor[:, :, None] + dqueries + dallocated[:, :, None] * sources
        t += incoming[:, :, None] * dsinks + din[:, :, None] * keys
        t = join_heads(t * query * (1.0 - query))
        tl.store(dq + at * dq_n + d, t.to(dq.dtype.element_ty), mask=ok)
    parts += (row * tl.num_programs(1) + split) * P
    tl.store(parts + c, tl.sum(key_sum, 0))


@triton.jit(do_not_specialize=SCALARS)
def _key_gradient(
    k, v, state, dtotal, query_parts, dk, k_b, k_n, v_b, v_n, dk_b, dk_n,
    tokens, per_split, heads, splits,
    D: tl.constexpr, W: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
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
    dtotal += row * (W + 1) * P
    queries, least_out, sinks, least, dsources, inverse, inner = _load_sources(
        state, dtotal, live, W, P
    )
    ds = load_blocks(dtotal, c[None, :], c[:, None], W, P)
    ds_high = high_part(ds, EXACT)
    ds_low = low_part(ds, EXACT)
    dkeys = split_heads(sum_splits(query_parts + row * splits * P, splits, P)[None, :], W)
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        valid = (n < last)[:, None]
        ok = valid & live
        at = n.to(tl.int64)[:, None]
        key = tl.load(k + at * k_n + d, mask=ok, other=ABSENT)
        value = operand(tl.load(v + at * v_n + d, mask=ok, other=0.0), EXACT)
        key = split_heads(sigmoid(key, EXACT), W)
        u = dot_halves(value, ds_high, ds_low, tl.zeros((BLOCK, P), tl.float32), EXACT)
        u = split_heads(u, W)
        conserved = flow(key, sinks, least)
        weight = tokens * inverse * exponential(tl.minimum(conserved, 1.0), EXACT)
        dconserved = weight * (tl.sum(key * u, 2) - inner)
        dconserved = tl.where(valid & (conserved < 1.0), dconserved, 0.0)
        outgoing = 1.0 / flow(key, queries, least_out)
        dout = -outgoing * outgoing * tl.sum(key * dsources, 2)
        u = u * weight[:, :, None] + dkeys + dconserved[:, :, None] * sinks
        u += outgoing[:, :, None] * dsources + dout[:, :, None] * queries
        u = join_heads(u * key * (1.0 - key))
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
    tensors = tuple(map(flatten_heads, (grad, query, key, value, dquery, dkey, dvalue)))
    grad, query, key, value, dquery, dkey, dvalue = tensors
    go, q, k, v, dq, dk, dv = map(strides_of, tensors)
    parts = how.empty(query, how.output_gradient.grid[1], how.padded + 1)
    launch(_output_gradient, how.output_gradient, query, grad, state, parts, *q, *go)
    dtotal = how.empty(query, how.padded + 1)
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
