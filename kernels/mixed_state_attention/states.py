"""The kernels of `mixed_state_attention` by states, forward and backward; see `plan.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linear_attention.forward import or_else, strides_of
from ..runtime.launch import launch
from ..runtime.mathematics import PRECISION, dot_halves, fold, high_part, low_part, operand
from .forward import load_queries
from .mathematics import (
    EPSILON,
    SCALARS,
    accumulate,
    by_place,
    feature_where,
    load_mixing,
    mix,
    token_of,
)
from .plan import StatePlan


@triton.jit(do_not_specialize=SCALARS)
def _sum_states(
    k, v, inverse, sums, states, k_b, k_n, k_h, v_b, v_n, v_h,
    tokens, heads, height, width, rows, columns, by_columns,
    D: tl.constexpr, P: tl.constexpr, SQUARES: tl.constexpr, BLOCK: tl.constexpr,
    FOLD: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """The state of one square of one head; or, of queries and the result's gradient, the gradient
    of its mixed state."""
    M: tl.constexpr = SQUARES * SQUARES
    EXACT: tl.constexpr = v.dtype.element_ty == tl.float32
    bh = tl.program_id(0) // M
    square = tl.program_id(0) % M
    k += (bh // heads).to(tl.int64) * k_b + (bh % heads) * k_h
    v += (bh // heads).to(tl.int64) * v_b + (bh % heads) * v_h
    inverse += bh.to(tl.int64) * tokens
    d = tl.arange(0, P)[None, :]
    total = tl.zeros((FOLD, P), tl.float32)
    state = tl.zeros((P, P), tl.float32)
    for start in range(0, rows * columns, BLOCK):
        place = start + tl.arange(0, BLOCK)
        n, here = token_of(square, place, height, width, rows, columns, by_columns, SQUARES)
        ok = here[:, None] & (d < D)
        at = n.to(tl.int64)[:, None]
        f = feature_where(tl.load(k + at * k_n + d, mask=ok, other=0.0), ok)
        value = operand(tl.load(v + at * v_n + d, mask=ok, other=0.0), EXACT)
        if GRADIENT:
            factor = tl.load(inverse + n, mask=here, other=0.0)
            value = value.to(tl.float32) * factor[:, None]
        else:
            total += fold(f.to(tl.float32), FOLD)
        state = accumulate(state, tl.trans(f), value, EXACT)
    at = tl.program_id(0).to(tl.int64) * P
    if not GRADIENT:
        tl.store(sums + at + tl.arange(0, P), tl.sum(total, 0))
    tl.store(states + (at + tl.arange(0, P)[:, None]) * P + d, state)


@triton.jit(do_not_specialize=["chunks", "first", "second"])
def _mix_states(
    states, mixing, mixed, forward, parts, chunks, first, second,
    P: tl.constexpr, M: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr,
    STEP: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """The sums over j of A[i, j] S_j for some elements of all states of one head; with the strides
    of A exchanged, of gradients. Of these also the part of dA that comes by the states."""
    bh = tl.program_id(0) // chunks
    i = tl.arange(0, LANES)[:, None]
    j = tl.arange(0, LANES)[None, :]
    ok = (i < M) & (j < M)
    a = tl.load(mixing + i * first + j * second, mask=ok, other=0.0).to(tl.float32)
    at = (bh.to(tl.int64) * M + i) * (P * P) + tl.program_id(0) % chunks * CHUNK
    part = tl.zeros((LANES, LANES), tl.float32)
    for start in range(0, CHUNK, STEP):
        here = at + start + tl.arange(0, STEP)[None, :]
        x = tl.load(states + here, mask=i < M, other=0.0)
        tl.store(mixed + here, tl.dot(a, x, input_precision=PRECISION), mask=i < M)
        if GRADIENT:
            s = tl.load(forward + here, mask=i < M, other=0.0)
            part = tl.dot(x, tl.trans(s), part, input_precision=PRECISION)
    if GRADIENT:
        parts += tl.program_id(0).to(tl.int64) * (LANES * LANES)
        tl.store(parts + i * LANES + j, part)


@triton.jit(do_not_specialize=SCALARS)
def _normalise(
    q, mixing, sums, inverse, q_b, q_n, q_h,
    tokens, heads, height, width, rows, columns, by_columns, tiles,
    D: tl.constexpr, P: tl.constexpr, SQUARES: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """1 / (z + 1e-6) of the queries of all squares at some places."""
    bh = tl.program_id(0) // tiles
    _, n, here, _, _, _, product = load_queries(
        q + (bh // heads).to(tl.int64) * q_b + (bh % heads) * q_h, sums, mixing, q_n, bh,
        tl.program_id(0) % tiles, height, width, rows, columns, by_columns,
        D, P, SQUARES, LANES, BLOCK,
    )  # fmt: skip
    j = tl.arange(0, LANES)
    z = mix(product, load_mixing(mixing, j[:, None], j[None, :], SQUARES))
    tl.store(inverse + bh.to(tl.int64) * tokens + n, 1.0 / (z + EPSILON), mask=here)


@triton.jit(do_not_specialize=SCALARS)
def _read(
    q, local, mixed, inverse, out, q_b, q_n, q_h, l_b, l_n, l_h, o_b, o_n, o_h,
    tokens, heads, height, width, rows, columns, by_columns,
    D: tl.constexpr, P: tl.constexpr, SQUARES: tl.constexpr, BLOCK: tl.constexpr,
    LOCAL: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = SQUARES * SQUARES
    EXACT: tl.constexpr = out.dtype.element_ty == tl.float32
    bh = tl.program_id(0) // M
    square = tl.program_id(0) % M
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    inverse += bh.to(tl.int64) * tokens
    e = tl.arange(0, P)[:, None]
    d = tl.arange(0, P)[None, :]
    s = tl.load(mixed + (tl.program_id(0).to(tl.int64) * P + e) * P + d)
    s_high = high_part(s, EXACT)
    s_low = low_part(s, EXACT)
    for start in range(0, rows * columns, BLOCK):
        place = start + tl.arange(0, BLOCK)
        n, here = token_of(square, place, height, width, rows, columns, by_columns, SQUARES)
        ok = here[:, None] & (d < D)
        at = n.to(tl.int64)[:, None]
        f = feature_where(tl.load(q + b * q_b + h * q_h + at * q_n + d, mask=ok, other=0.0), ok)
        factor = tl.load(inverse + n, mask=here, other=0.0)
        y = dot_halves(f, s_high, s_low, tl.zeros((BLOCK, P), tl.float32), EXACT)
        y *= factor[:, None]
        if LOCAL:
            branch = local + b * l_b + h * l_h + at * l_n + d
            y += tl.load(branch, mask=ok, other=0.0).to(tl.float32)
        tl.store(out + b * o_b + h * o_h + at * o_n + d, y.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=SCALARS)
def _differentiate_read(
    q, go, mixed, inverse, sums, slopes, dsums, dq,
    q_b, q_n, q_h, go_b, go_n, go_h, dq_b, dq_n, dq_h,
    tokens, heads, height, width, rows, columns, by_columns,
    D: tl.constexpr, P: tl.constexpr, SQUARES: tl.constexpr, BLOCK: tl.constexpr,
    FOLD: tl.constexpr, MEASURE: tl.constexpr,
):  # fmt: skip
    """MEASURE: to `slopes` the gradient of z. Else dq, and the gradient of the sum of phi(k) in
    the square, from the gradient of each query's product with it."""
    M: tl.constexpr = SQUARES * SQUARES
    EXACT: tl.constexpr = dq.dtype.element_ty == tl.float32
    bh = tl.program_id(0) // M
    square = tl.program_id(0) % M
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    inverse += bh.to(tl.int64) * tokens
    slopes += bh.to(tl.int64) * tokens
    e = tl.arange(0, P)[:, None]
    d = tl.arange(0, P)[None, :]
    at_square = tl.program_id(0).to(tl.int64) * P
    s = tl.load(mixed + (at_square + d) * P + e)
    s_high = high_part(s, EXACT)
    s_low = low_part(s, EXACT)
    total = tl.load(sums + at_square + d)
    dtotal = tl.zeros((FOLD, P), tl.float32)
    for start in range(0, rows * columns, BLOCK):
        place = start + tl.arange(0, BLOCK)
        n, here = token_of(square, place, height, width, rows, columns, by_columns, SQUARES)
        ok = here[:, None] & (d < D)
        at = n.to(tl.int64)[:, None]
        x = tl.load(q + b * q_b + h * q_h + at * q_n + d, mask=ok, other=0.0)
        grad = tl.load(go + b * go_b + h * go_h + at * go_n + d, mask=ok, other=0.0)
        f = feature_where(x, ok).to(tl.float32)
        factor = tl.load(inverse + n, mask=here, other=0.0)
        zeros = tl.zeros((BLOCK, P), tl.float32)
        df = dot_halves(operand(grad, EXACT), s_high, s_low, zeros, EXACT) * factor[:, None]
        if MEASURE:
            tl.store(slopes + n, -factor * tl.sum(f * df, 1), mask=here)
        else:
            slope = tl.load(slopes + n, mask=here, other=0.0)[:, None]
            dtotal += fold(slope * f, FOLD)
            df = tl.where(x.to(tl.float32) > 0, df + slope * total, 0.0)
            at_dq = dq + b * dq_b + h * dq_h + at * dq_n + d
            tl.store(at_dq, df.to(dq.dtype.element_ty), mask=ok)
    if not MEASURE:
        tl.store(dsums + at_square + tl.arange(0, P), tl.sum(dtotal, 0))


@triton.jit(do_not_specialize=SCALARS)
def _mix_slopes(
    q, mixing, sums, dz, slopes, parts, q_b, q_n, q_h,
    tokens, heads, height, width, rows, columns, by_columns, tiles,
    D: tl.constexpr, P: tl.constexpr, SQUARES: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of each query's product with the sum of phi(k) in its square, from that of z;
    and the part of dA that comes by z."""
    bh = tl.program_id(0) // tiles
    _, n, here, _, _, _, product = load_queries(
        q + (bh // heads).to(tl.int64) * q_b + (bh % heads) * q_h, sums, mixing, q_n, bh,
        tl.program_id(0) % tiles, height, width, rows, columns, by_columns,
        D, P, SQUARES, LANES, BLOCK,
    )  # fmt: skip
    j = tl.arange(0, LANES)
    at = bh.to(tl.int64) * tokens + n
    gradient = tl.load(dz + at, mask=here, other=0.0)
    slope = mix(gradient, load_mixing(mixing, j[None, :], j[:, None], SQUARES))
    tl.store(slopes + at, slope, mask=here)
    part = by_place(gradient, LANES)[:, :, None] * by_place(product, LANES)[:, None, :]
    parts += tl.program_id(0).to(tl.int64) * (LANES * LANES)
    tl.store(parts + j[:, None] * LANES + j[None, :], tl.sum(part, 0))


@triton.jit(do_not_specialize=SCALARS)
def _differentiate_states(
    k, v, dstates, dsums, dk, dv,
    k_b, k_n, k_h, v_b, v_n, v_h, dk_b, dk_n, dk_h, dv_b, dv_n, dv_h,
    heads, height, width, rows, columns, by_columns,
    D: tl.constexpr, P: tl.constexpr, SQUARES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dk and dv of one square of one head."""
    M: tl.constexpr = SQUARES * SQUARES
    EXACT: tl.constexpr = dk.dtype.element_ty == tl.float32
    bh = tl.program_id(0) // M
    square = tl.program_id(0) % M
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    e = tl.arange(0, P)[:, None]
    d = tl.arange(0, P)[None, :]
    at_square = tl.program_id(0).to(tl.int64) * P
    ds = tl.load(dstates + (at_square + e) * P + d)
    ds_high = high_part(ds, EXACT)
    ds_low = low_part(ds, EXACT)
    dtotal = tl.load(dsums + at_square + d)
    for start in range(0, rows * columns, BLOCK):
        place = start + tl.arange(0, BLOCK)
        n, here = token_of(square, place, height, width, rows, columns, by_columns, SQUARES)
        ok = here[:, None] & (d < D)
        at = n.to(tl.int64)[:, None]
        x = tl.load(k + b * k_b + h * k_h + at * k_n + d, mask=ok, other=0.0)
        value = tl.load(v + b * v_b + h * v_h + at * v_n + d, mask=ok, other=0.0)
        zeros = tl.zeros((BLOCK, P), tl.float32)
        dg = dtotal + dot_halves(
            operand(value, EXACT), tl.trans(ds_high), tl.trans(ds_low), zeros, EXACT
        )
        dg = tl.where(x.to(tl.float32) > 0, dg, 0.0)
        at_dk = dk + b * dk_b + h * dk_h + at * dk_n + d
        tl.store(at_dk, dg.to(dk.dtype.element_ty), mask=ok)
        y = dot_halves(feature_where(x, ok), ds_high, ds_low, zeros, EXACT)
        at_dv = dv + b * dv_b + h * dv_h + at * dv_n + d
        tl.store(at_dv, y.to(dv.dtype.element_ty), mask=ok)


def _mix(how: StatePlan, states: Tensor, mixing: Tensor) -> Tensor:
    mixed = torch.empty_like(states)
    launch(_mix_states, how.mix_states, states, mixing, mixed, states, states)
    return mixed


def forward(
    how: StatePlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    local: Tensor | None,
    sums: Tensor,
    states: Tensor,
    inverse: Tensor,
    out: Tensor,
) -> None:
    """Write the result to `out`, and what `backward` needs: phi(k) summed by square, the states,
    and of each query 1 / (z + 1e-6)."""
    launch(
        _sum_states, how.sum_states,
        key, value, inverse, sums, states, *strides_of(key), *strides_of(value),
    )  # fmt: skip
    launch(_normalise, how.normalise, query, mixing, sums, inverse, *strides_of(query))
    launch(
        _read, how.read,
        query, or_else(local, query), _mix(how, states, mixing), inverse, out,
        *strides_of(query), *strides_of(local), *strides_of(out),
    )  # fmt: skip


def backward(
    how: StatePlan,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    sums: Tensor,
    states: Tensor,
    inverse: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
) -> Tensor:
    """Write the gradients of query, key and value; return that of the mixing, in float32."""
    dmixed, dstates, dsums = map(torch.empty_like, (states, states, sums))
    dz, slopes = torch.empty_like(inverse), torch.empty_like(inverse)
    by_states, by_z = [sums.new_empty(shape) for shape in how.parts]
    strides = *strides_of(query), *strides_of(grad), *strides_of(dquery)
    launch(_sum_states, how.sum_gradients, query, grad, inverse, sums, dmixed, *strides[:6])
    launch(_mix_states, how.mix_gradients, dmixed, mixing, dstates, states, by_states)
    read = query, grad, _mix(how, states, mixing), inverse, sums
    launch(_differentiate_read, how.measure, *read, dz, dsums, dquery, *strides)
    launch(_mix_slopes, how.mix_slopes, query, mixing, sums, dz, slopes, by_z, *strides[:3])
    launch(_differentiate_read, how.differentiate_read, *read, slopes, dsums, dquery, *strides)
    launch(
        _differentiate_states, how.differentiate_states,
        key, value, dstates, dsums, dkey, dvalue,
        *strides_of(key), *strides_of(value), *strides_of(dkey), *strides_of(dvalue),
    )  # fmt: skip
    squares = len(mixing)
    return (by_states.sum(0) + by_z.sum(0))[:squares, :squares]
