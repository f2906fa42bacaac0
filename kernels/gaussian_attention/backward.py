"""The backward kernels of `gaussian_attention`; `plan.py` has their order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..landmark_kernel.mathematics import half_square, rows_of
from ..runtime.launch import launch
from ..runtime.mathematics import (
    dot,
    dot_halves,
    exponential,
    high_part,
    low_part,
    multiply,
    operand,
    single,
)
from .forward import SCALARS, apply, gather
from .plan import plan


@triton.jit
def _round_to_product(e, IEEE: tl.constexpr):
    """The nearest number that `_weigh` multiplies exactly: a sum of two bfloat16, 16 bits."""
    if IEEE:
        return e
    else:
        return high_part(e, IEEE).to(tl.float32) + low_part(e, IEEE).to(tl.float32)


@triton.jit
def _weigh(e, x, accumulator, IEEE: tl.constexpr):
    """accumulator + e @ x, no product left out: of sum_j E_ij (l_j - q_i), where a token is its
    own landmark, both terms are large and must cancel."""
    if IEEE or x.dtype == tl.bfloat16:
        return dot(e, x, accumulator, IEEE)
    else:
        x = x.to(tl.float32)
        accumulator = dot_halves(e, high_part(x, IEEE), low_part(x, IEEE), accumulator, IEEE)
        return multiply(low_part(e, IEEE), low_part(x, IEEE), accumulator)


@triton.jit
def _tile_gradient(
    query, value, dy, query_half, mark, weight, du, dvalue, dquery, mass, scale,
    IEEE: tl.constexpr,
):  # fmt: skip
    """One tile's E, and dv, dq / s + s sum(E) q and sum(E) with its part added."""
    score = scale * multiply(query, tl.trans(mark)) - query_half - half_square(mark)[None, :]
    kernel = exponential(score, IEEE)
    e = tl.zeros((query.shape[0], mark.shape[0]), tl.float32)
    e = dot(operand(dy, IEEE), tl.trans(weight), e, IEEE)
    e = dot(operand(value, IEEE), tl.trans(du), e, IEEE)
    dvalue = dot(kernel, du, dvalue, IEEE)
    e = _round_to_product(e * kernel, IEEE)
    dquery = _weigh(e, mark, dquery, IEEE)
    return e, dvalue, dquery, mass + tl.sum(e, 1)


@triton.jit(do_not_specialize=SCALARS)
def _token_gradient(
    q, k, v, grad, w, d_u, dq, dv, parts,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, g_b, g_n, g_h,
    dq_b, dq_n, dq_h, dv_b, dv_n, dv_h,
    tokens, per_split, marks, heads, scale,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """dq and dv of one split's tokens; if WHOLE, its part of dl as well."""
    scale = single(scale)
    bh = tl.program_id(0)
    split = tl.program_id(1)
    IEEE: tl.constexpr = q.dtype.element_ty == tl.float32
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    grad += b * g_b + h * g_h
    dq += b * dq_b + h * dq_h
    dv += b * dv_b + h * dv_h
    w += bh.to(tl.int64) * marks * P
    d_u += bh.to(tl.int64) * marks * P
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    d = tl.arange(0, P)[None, :]
    if WHOLE:
        mark = rows_of(k, 0, marks, k_n, D, P, BM)
        weight = rows_of(w, 0, marks, P, P, P, BM)
        du = rows_of(d_u, 0, marks, P, P, P, BM)
        dmark = tl.zeros((BM, P), tl.float32)
        mark_mass = tl.zeros((BM,), tl.float32)
    for start in range(first, last, BLOCK):
        query = rows_of(q, start, last, q_n, D, P, BLOCK)
        value = rows_of(v, start, last, v_n, D, P, BLOCK)
        dy = rows_of(grad, start, last, g_n, D, P, BLOCK)
        query_half = scale * scale * half_square(query)[:, None]
        dvalue = tl.zeros((BLOCK, P), tl.float32)
        dquery = tl.zeros((BLOCK, P), tl.float32)
        mass = tl.zeros((BLOCK,), tl.float32)
        if WHOLE:
            e, dvalue, dquery, mass = _tile_gradient(
                query, value, dy, query_half, mark, weight, du, dvalue, dquery, mass, scale, IEEE
            )
            dmark = _weigh(tl.trans(e), query, dmark, IEEE)
            mark_mass += tl.sum(e, 0)
        else:
            for m in range(0, marks, BM):
                _, dvalue, dquery, mass = _tile_gradient(
                    query, value, dy, query_half,
                    rows_of(k, m, marks, k_n, D, P, BM),
                    rows_of(w, m, marks, P, P, P, BM),
                    rows_of(d_u, m, marks, P, P, P, BM),
                    dvalue, dquery, mass, scale, IEEE,
                )  # fmt: skip
        dquery = scale * (dquery - (scale * mass)[:, None] * query.to(tl.float32))
        n = start + tl.arange(0, BLOCK)
        at = n.to(tl.int64)[:, None]
        mask = (n < last)[:, None] & (d < D)
        tl.store(dq + at * dq_n + d, dquery.to(dq.dtype.element_ty), mask=mask)
        tl.store(dv + at * dv_n + d, dvalue.to(dv.dtype.element_ty), mask=mask)
    if WHOLE:
        dmark = scale * dmark - mark_mass[:, None] * mark.to(tl.float32)
        row = tl.arange(0, BM)[:, None]
        parts += (bh.to(tl.int64) * tl.num_programs(1) + split) * marks * P
        tl.store(parts + row * P + d, dmark, mask=row < marks)


@triton.jit(do_not_specialize=SCALARS)
def _landmark_gradient(
    q, k, v, grad, w, d_u, parts,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, g_b, g_n, g_h,
    tokens, per_split, marks, heads, scale,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """One split's part of dl, for BM landmarks per program."""
    scale = single(scale)
    bh = tl.program_id(0)
    split = tl.program_id(1)
    m = tl.program_id(2) * BM
    IEEE: tl.constexpr = q.dtype.element_ty == tl.float32
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    grad += b * g_b + h * g_h
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    mark = rows_of(k, m, marks, k_n, D, P, BM)
    mark_half = half_square(mark)[:, None]
    weight = rows_of(w + bh.to(tl.int64) * marks * P, m, marks, P, P, P, BM)
    du = rows_of(d_u + bh.to(tl.int64) * marks * P, m, marks, P, P, P, BM)
    dmark = tl.zeros((BM, P), tl.float32)
    mass = tl.zeros((BM,), tl.float32)
    for start in range(first, last, BLOCK):
        query = rows_of(q, start, last, q_n, D, P, BLOCK)
        value = operand(rows_of(v, start, last, v_n, D, P, BLOCK), IEEE)
        dy = operand(rows_of(grad, start, last, g_n, D, P, BLOCK), IEEE)
        score = scale * multiply(mark, tl.trans(query)) - mark_half
        score -= scale * scale * half_square(query)[None, :]
        e = tl.zeros((BM, BLOCK), tl.float32)
        e = dot(weight, tl.trans(dy), e, IEEE)
        e = dot(du, tl.trans(value), e, IEEE)
        e = _round_to_product(e * exponential(score, IEEE), IEEE)
        dmark = _weigh(e, query, dmark, IEEE)
        mass += tl.sum(e, 1)
    dmark = scale * dmark - mass[:, None] * mark.to(tl.float32)
    row = (m + tl.arange(0, BM))[:, None]
    parts += (bh.to(tl.int64) * tl.num_programs(1) + split) * marks * P
    tl.store(parts + row * P + tl.arange(0, P)[None, :], dmark, mask=row < marks)


def backward(
    grad: Tensor,
    query: Tensor,
    landmarks: Tensor,
    value: Tensor,
    inverse: Tensor,
    state: Tensor,
    scale: float,
    dquery: Tensor,
    dlandmarks: Tensor,
    dvalue: Tensor,
    dinverse: Tensor,
) -> None:
    """Write every gradient."""
    how = plan(query.shape, landmarks.shape[1], scale, False, query.dtype, query.device)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=query.device)

    u, w = state
    dw, du = empty(2, how.rows, how.marks, how.padded)
    apply(how, gather(how, query, landmarks, grad), inverse, dw, du, u, dinverse)
    inputs = (query, landmarks, value, grad, w, du)
    strides = [stride for x in inputs[:4] for stride in x.stride()[:3]]
    summed = how.token_gradient if how.is_whole else how.landmark_gradient
    parts = empty(how.rows, summed.grid[1], how.marks, how.padded)
    launch(
        _token_gradient, how.token_gradient,
        *inputs, dquery, dvalue, parts, *strides, *dquery.stride()[:3], *dvalue.stride()[:3],
    )  # fmt: skip
    if not how.is_whole:
        launch(_landmark_gradient, how.landmark_gradient, *inputs, parts, *strides)
    batch, _, heads, width = query.shape
    total = parts.sum(1)[..., :width]
    dlandmarks.copy_(total.unflatten(0, (batch, heads)).transpose(1, 2))
