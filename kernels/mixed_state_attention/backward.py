"""The backward kernels of `mixed_state_attention` by pairs of tokens; see `plan.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linear_attention.forward import strides_of
from ..runtime.launch import launch
from ..runtime.mathematics import operand
from .forward import load_queries
from .mathematics import (
    EPSILON,
    SCALARS,
    accumulate,
    by_place,
    feature,
    feature_where,
    load_mixing,
    mix,
    one_hot,
    square_of,
    weights_of,
)
from .plan import Plan


@triton.jit(do_not_specialize=SCALARS)
def _query_gradient(
    q, k, v, go, mixing, sums, dq, factors, parts,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, go_b, go_n, go_h, dq_b, dq_n, dq_h,
    tokens, heads, height, width, rows, columns, by_width, by_rows, by_columns, tiles,
    D: tl.constexpr, P: tl.constexpr, SQUARES: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dq, this program's part of dA, and for the keys two factors of each query: 1 / (z + 1e-6),
    and the gradient of its product with the sum of phi(k) in its square."""
    bh = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    EXACT: tl.constexpr = dq.dtype.element_ty == tl.float32
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    square, n, here, x, f, total, product = load_queries(
        q + b * q_b + h * q_h, sums, mixing, q_n, bh, tile,
        height, width, rows, columns, by_columns, D, P, SQUARES, LANES, BLOCK,
    )  # fmt: skip
    j = tl.arange(0, LANES)
    z = mix(product, load_mixing(mixing, j[:, None], j[None, :], SQUARES))
    inverse = 1.0 / (z + EPSILON)
    weights = load_mixing(mixing, square[:, None], j[None, :], SQUARES)
    d = tl.arange(0, P)[None, :]
    here_d = here[:, None] & (d < D)
    at = n.to(tl.int64)[:, None]
    grad = tl.load(go + b * go_b + h * go_h + at * go_n + d, mask=here_d, other=0.0)
    grad = operand(grad, EXACT)
    df = tl.zeros((BLOCK, P), tl.float32)
    read = tl.zeros((BLOCK, LANES), tl.float32)  # by square j: phi(q) S_j dy / (z + 1e-6)
    for start in range(0, tokens, STEP):
        m = start + tl.arange(0, STEP)
        ok = (m < tokens)[:, None] & (d < D)
        at_m = m.to(tl.int64)[:, None]
        g = feature(tl.load(k + at_m * k_n + d, mask=ok, other=0.0))
        value = operand(tl.load(v + at_m * v_n + d, mask=ok, other=0.0), EXACT)
        theirs = square_of(m, tokens, width, by_width, by_rows, by_columns, SQUARES)
        hot = one_hot(theirs, LANES, EXACT)
        zeros = tl.zeros((BLOCK, STEP), tl.float32)
        t = accumulate(zeros, grad, tl.trans(value), EXACT) * inverse[:, None]
        s = accumulate(zeros, f, tl.trans(g), EXACT)
        read = accumulate(read, s * t, tl.trans(hot), EXACT)
        df = accumulate(df, t * weights_of(weights, hot, EXACT), g, EXACT)
    dz = -inverse * tl.sum(read * weights, 1)
    slope = mix(dz, load_mixing(mixing, j[None, :], j[:, None], SQUARES))
    df += slope[:, None] * total
    df = tl.where(x.to(tl.float32) > 0, df, 0.0)
    out = dq + b * dq_b + h * dq_h + at * dq_n + d
    tl.store(out, df.to(dq.dtype.element_ty), mask=here_d)
    factors += bh.to(tl.int64) * (2 * tokens) + n
    tl.store(factors, inverse, mask=here)
    tl.store(factors + tokens, slope, mask=here)
    part = tl.sum(tl.reshape(read, (BLOCK // LANES, LANES, LANES)), 0)
    part += tl.sum(by_place(dz, LANES)[:, :, None] * by_place(product, LANES)[:, None, :], 0)
    parts += tl.program_id(0).to(tl.int64) * (LANES * LANES)
    tl.store(parts + j[:, None] * LANES + j[None, :], part)


@triton.jit(do_not_specialize=SCALARS)
def _key_gradient(
    q, k, v, go, mixing, factors, dk, dv,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, go_b, go_n, go_h,
    dk_b, dk_n, dk_h, dv_b, dv_n, dv_h,
    tokens, heads, width, by_width, by_rows, by_columns, tiles,
    D: tl.constexpr, P: tl.constexpr, SQUARES: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    EXACT: tl.constexpr = dk.dtype.element_ty == tl.float32
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    q += b * q_b + h * q_h
    go += b * go_b + h * go_h
    factors += bh.to(tl.int64) * (2 * tokens)
    n = tile * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, P)[None, :]
    here = (n < tokens)[:, None] & (d < D)
    at = n.to(tl.int64)[:, None]
    x = tl.load(k + b * k_b + h * k_h + at * k_n + d, mask=here, other=0.0)
    g = feature(x)
    value = operand(tl.load(v + b * v_b + h * v_h + at * v_n + d, mask=here, other=0.0), EXACT)
    square = square_of(n, tokens, width, by_width, by_rows, by_columns, SQUARES)
    weights = load_mixing(mixing, tl.arange(0, LANES)[None, :], square[:, None], SQUARES)
    dg = tl.zeros((BLOCK, P), tl.float32)
    total = tl.zeros((BLOCK, P), tl.float32)
    for start in range(0, tokens, STEP):
        m = start + tl.arange(0, STEP)
        valid = m < tokens
        ok = valid[:, None] & (d < D)
        at_m = m.to(tl.int64)[:, None]
        f = feature_where(tl.load(q + at_m * q_n + d, mask=ok, other=0.0), ok)
        grad = operand(tl.load(go + at_m * go_n + d, mask=ok, other=0.0), EXACT)
        inverse = tl.load(factors + m, mask=valid, other=0.0)
        slope = tl.load(factors + tokens + m, mask=valid, other=0.0)
        theirs = square_of(m, tokens, width, by_width, by_rows, by_columns, SQUARES)
        weight = weights_of(weights, one_hot(theirs, LANES, EXACT), EXACT) * inverse[None, :]
        zeros = tl.zeros((BLOCK, STEP), tl.float32)
        s = accumulate(zeros, g, tl.trans(f), EXACT) * weight
        total = accumulate(total, s, grad, EXACT)
        t = accumulate(zeros, value, tl.trans(grad), EXACT) * weight
        t += tl.where(square[:, None] == theirs[None, :], slope[None, :], 0.0)
        dg = accumulate(dg, t, f, EXACT)
    dg = tl.where(x.to(tl.float32) > 0, dg, 0.0)
    out = dk + b * dk_b + h * dk_h + at * dk_n + d
    tl.store(out, dg.to(dk.dtype.element_ty), mask=here)
    out = dv + b * dv_b + h * dv_h + at * dv_n + d
    tl.store(out, total.to(dv.dtype.element_ty), mask=here)


def backward(
    how: Plan,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    sums: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
) -> Tensor:
    """Write the gradients of query, key and value; return that of the mixing, in float32."""
    factors = query.new_empty(how.factors, dtype=torch.float32)
    parts = query.new_empty(how.parts, dtype=torch.float32)
    launch(
        _query_gradient, how.query_gradient,
        query, key, value, grad, mixing, sums, dquery, factors, parts,
        *strides_of(query), *strides_of(key), *strides_of(value), *strides_of(grad),
        *strides_of(dquery),
    )  # fmt: skip
    launch(
        _key_gradient, how.key_gradient,
        query, key, value, grad, mixing, factors, dkey, dvalue,
        *strides_of(query), *strides_of(key), *strides_of(value), *strides_of(grad),
        *strides_of(dkey), *strides_of(dvalue),
    )  # fmt: skip
    squares = len(mixing)
    return parts.sum(0)[:squares, :squares]
