"""The forward kernels of `gaussian_attention`; `plan.py` has their order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..landmark_kernel.mathematics import half_square, rows_of
from ..runtime.launch import launch
from ..runtime.mathematics import (
    PRECISION,
    dot,
    dot_halves,
    exponential,
    high_part,
    low_part,
    multiply,
    operand,
    single,
)
from .plan import Plan, plan

# Sizes that change from call to call and do not need other machine code.
SCALARS = ["tokens", "per_split", "splits", "marks", "heads", "rows"]


@triton.jit(do_not_specialize=SCALARS)
def _gather(
    q, k, x, parts,
    q_b, q_n, q_h, k_b, k_n, k_h, x_b, x_n, x_h,
    tokens, per_split, marks, heads, scale,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """One split's part of K^T x: BM landmarks of one head per program."""
    scale = single(scale)
    bh = tl.program_id(0)
    split = tl.program_id(1)
    m = tl.program_id(2) * BM
    IEEE: tl.constexpr = q.dtype.element_ty == tl.float32
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    x += b * x_b + h * x_h
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    mark = rows_of(k, m, marks, k_n, D, P, BM)
    mark_half = half_square(mark)[:, None]
    total = tl.zeros((BM, P), tl.float32)
    for start in range(first, last, BLOCK):
        query = rows_of(q, start, last, q_n, D, P, BLOCK)
        y = operand(rows_of(x, start, last, x_n, D, P, BLOCK), IEEE)
        score = scale * multiply(mark, tl.trans(query)) - mark_half
        score -= scale * scale * half_square(query)[None, :]
        total = dot(exponential(score, IEEE), y, total, IEEE)
    row = m + tl.arange(0, BM)
    parts += (bh.to(tl.int64) * tl.num_programs(1) + split) * marks * P
    at = row[:, None] * P + tl.arange(0, P)[None, :]
    tl.store(parts + at, total, mask=(row < marks)[:, None])


@triton.jit
def _sum_parts(parts, m, splits, marks, P: tl.constexpr, BM: tl.constexpr):
    """The splits' parts of BM landmarks, summed in a fixed order."""
    row = m + tl.arange(0, BM)
    at = row[:, None] * P + tl.arange(0, P)[None, :]
    total = tl.zeros((BM, P), tl.float32)
    for _ in range(splits):
        total += tl.load(parts + at, mask=(row < marks)[:, None], other=0.0)
        parts += marks * P
    return total


@triton.jit(do_not_specialize=SCALARS)
def _apply(
    parts, inverse, u, total, product, dinverse, splits, marks,
    P: tl.constexpr, BM: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """total = the sum of the parts, product = inverse @ total: BM rows of one head per program.

    Backward, product = inverse^T @ total and dinverse = total @ u^T.
    """
    bh = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BM
    parts += bh * splits * marks * P
    inverse += bh * marks * marks
    u += bh * marks * P
    total += bh * marks * P
    product += bh * marks * P
    dinverse += bh * marks * marks
    row = m + tl.arange(0, BM)
    live = (row < marks)[:, None]
    d = tl.arange(0, P)[None, :]
    own = _sum_parts(parts, m, splits, marks, P, BM)
    tl.store(total + row[:, None] * P + d, own, mask=live)
    result = tl.zeros((BM, P), tl.float32)
    for start in range(0, marks, BM):
        column = start + tl.arange(0, BM)
        mask = live & (column < marks)[None, :]
        if BACKWARD:
            at = column[None, :].to(tl.int64) * marks + row[:, None]
        else:
            at = row[:, None].to(tl.int64) * marks + column[None, :]
        a = tl.load(inverse + at, mask=mask, other=0.0)
        other = _sum_parts(parts, start, splits, marks, P, BM)
        result = tl.dot(a, other, result, input_precision=PRECISION)
        if BACKWARD:
            gathered = tl.load(
                u + column[:, None] * P + d, mask=(column < marks)[:, None], other=0.0
            )
            gradient = tl.dot(own, tl.trans(gathered), input_precision=PRECISION)
            at = row[:, None].to(tl.int64) * marks + column[None, :]
            tl.store(dinverse + at, gradient, mask=mask)
    tl.store(product + row[:, None] * P + d, result, mask=live)


@triton.jit(do_not_specialize=SCALARS)
def _scatter(
    q, k, w, local, out,
    q_b, q_n, q_h, k_b, k_n, k_h, c_b, c_n, c_h, o_b, o_n, o_h,
    tokens, per_split, marks, heads, scale,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
    WHOLE: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """y = K w + local; WHOLE says that all landmarks fit in BM and are read once."""
    scale = single(scale)
    bh = tl.program_id(0)
    split = tl.program_id(1)
    IEEE: tl.constexpr = q.dtype.element_ty == tl.float32
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    local += b * c_b + h * c_h
    out += b * o_b + h * o_h
    w += bh.to(tl.int64) * marks * P
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    d = tl.arange(0, P)[None, :]
    if WHOLE:
        mark = rows_of(k, 0, marks, k_n, D, P, BM)
        weight = rows_of(w, 0, marks, P, P, P, BM)
        mark_half = half_square(mark)[None, :]
        high = high_part(weight, IEEE)
        low = low_part(weight, IEEE)
    for start in range(first, last, BLOCK):
        query = rows_of(q, start, last, q_n, D, P, BLOCK)
        query_half = scale * scale * half_square(query)[:, None]
        y = tl.zeros((BLOCK, P), tl.float32)
        if WHOLE:
            score = scale * multiply(query, tl.trans(mark)) - query_half - mark_half
            y = dot_halves(exponential(score, IEEE), high, low, y, IEEE)
        else:
            for m in range(0, marks, BM):
                mark = rows_of(k, m, marks, k_n, D, P, BM)
                weight = rows_of(w, m, marks, P, P, P, BM)
                score = scale * multiply(query, tl.trans(mark)) - query_half
                score -= half_square(mark)[None, :]
                y = dot(exponential(score, IEEE), weight, y, IEEE)
        n = start + tl.arange(0, BLOCK)
        mask = (n < last)[:, None] & (d < D)
        if LOCAL:
            at = n.to(tl.int64)[:, None] * c_n + d
            y += tl.load(local + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + n.to(tl.int64)[:, None] * o_n + d, y.to(out.dtype.element_ty), mask=mask)


def gather(how: Plan, query: Tensor, landmarks: Tensor, x: Tensor) -> Tensor:
    """K^T x, as parts (B heads, splits, M, P) in float32."""
    parts = _empty(query, how.rows, how.gather.grid[1], how.marks, how.padded)
    strides = (*query.stride()[:3], *landmarks.stride()[:3], *x.stride()[:3])
    launch(_gather, how.gather, query, landmarks, x, parts, *strides)
    return parts


def apply(
    how: Plan,
    parts: Tensor,
    inverse: Tensor,
    total: Tensor,
    product: Tensor,
    u: Tensor | None = None,
    dinverse: Tensor | None = None,
) -> None:
    """Write the sum of the parts to `total` and its product with the inverse to `product`.

    In the backward pass, with `u`, the inverse is transposed and its gradient goes to `dinverse`.
    """
    if u is None:
        launch(_apply, how.apply, parts, inverse, parts, total, product, parts)
    else:
        launch(_apply, how.apply_backward, parts, inverse, u, total, product, dinverse)


def forward(
    query: Tensor,
    landmarks: Tensor,
    value: Tensor,
    inverse: Tensor,
    local: Tensor | None,
    scale: float,
    out: Tensor,
) -> Tensor:
    """Write the result to `out`; return u and w, (2, B heads, M, P), for `backward`."""
    marks = landmarks.shape[1]
    how = plan(query.shape, marks, scale, local is not None, query.dtype, query.device)
    state = _empty(query, 2, how.rows, how.marks, how.padded)
    apply(how, gather(how, query, landmarks, value), inverse, *state)
    local_strides = (0, 0, 0) if local is None else local.stride()[:3]
    launch(
        _scatter, how.scatter,
        query, landmarks, state[1], out if local is None else local, out,
        *query.stride()[:3], *landmarks.stride()[:3], *local_strides, *out.stride()[:3],
    )  # fmt: skip
    return state


def _empty(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.device)
