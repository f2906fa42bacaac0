"""The backward kernels of `hash_attention`; `plan.py` has their order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from ..runtime.mathematics import dot, dot_halves, multiply, operand
from .mathematics import (
    SCALARS,
    as_operand,
    direction,
    kernel_values,
    load_anchors,
    load_code,
    load_state,
)
from .plan import plan


@triton.jit(do_not_specialize=SCALARS)
def _state_gradient(
    go, v, codes, state, parts, go_b, go_n, go_h, v_b, v_n, v_h, tokens, per_split, heads,
    D: tl.constexpr, P: tl.constexpr, BITS: tl.constexpr, CODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0)
    split = tl.program_id(1)
    EXACT: tl.constexpr = v.dtype.element_ty == tl.float32
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    v += b * v_b + h * v_h
    go += b * go_b + h * go_h
    codes += bh.to(tl.int64) * tokens * CODE
    s_high, s_low, total = load_state(state + bh.to(tl.int64) * (CODE * (P + 1)), CODE, P, EXACT)
    d = tl.arange(0, P)[None, :]
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    dstate = tl.zeros((P, CODE), tl.float32)
    dtotal = tl.zeros((BLOCK, CODE), tl.float32)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        valid = (n < last)[:, None]
        ok = valid & (d < D)
        at = n.to(tl.int64)[:, None]
        value = tl.load(v + at * v_n + d, mask=ok, other=0.0).to(tl.float32)
        grad = tl.load(go + at * go_n + d, mask=ok, other=0.0).to(tl.float32)
        code, _ = load_code(codes, n, valid, CODE)
        norm = tl.sum(code * total[None, :], 1) + tokens * (BITS + 1.0)
        c = as_operand(code, EXACT)
        y = dot_halves(c, s_high, s_low, value * (BITS + 1.0), EXACT)
        grad /= norm[:, None]
        dnorm = -tl.sum(grad * y, 1) / norm
        dtotal += dnorm[:, None] * code
        dstate = dot(tl.trans(grad), c, dstate, EXACT)
    parts += (bh.to(tl.int64) * tl.num_programs(1) + split) * (CODE * (P + 1))
    row = tl.arange(0, CODE)
    tl.store(parts + row[None, :] * (P + 1) + tl.arange(0, P)[:, None], dstate)
    tl.store(parts + row * (P + 1) + P, tl.sum(dtotal, 0))


@triton.jit(do_not_specialize=SCALARS)
def _token_gradient(
    go, q, v, anchors, hyperplanes, codes, state, dstate, distances, slopes, out,
    go_b, go_n, go_h, q_b, q_n, q_h, v_b, v_n, v_h, tokens, per_split, heads,
    D: tl.constexpr, P: tl.constexpr, ANCHORS: tl.constexpr, M: tl.constexpr,
    BITS: tl.constexpr, CODE: tl.constexpr, QUERY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the values, and this program's part of that of the mean distance; or, if
    QUERY, the gradient of the queries."""
    bh = tl.program_id(0)
    split = tl.program_id(1)
    EXACT: tl.constexpr = v.dtype.element_ty == tl.float32
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    q += b * q_b + h * q_h
    v += b * v_b + h * v_h
    go += b * go_b + h * go_h
    out += (b * tokens * heads + h) * D
    codes += bh.to(tl.int64) * tokens * CODE
    place = bh.to(tl.int64) * (CODE * (P + 1))
    s_high, s_low, total = load_state(state + place, CODE, P, EXACT)
    ds_high, ds_low, dtotal = load_state(dstate + place, CODE, P, EXACT)
    d = tl.arange(0, P)[None, :]
    m = tl.arange(0, M)[None, :]
    bit = tl.arange(0, CODE)[:, None]
    a, squares = load_anchors(anchors, h, D, P, ANCHORS, M)
    held = (bit < BITS) & (m < ANCHORS)
    planes = tl.load(hyperplanes + (h * BITS + bit) * ANCHORS + m, mask=held, other=0.0)
    mean = tl.load(distances + bh)
    if QUERY:
        dmean = tl.load(slopes + bh) / tokens / ANCHORS
    else:
        slope = tl.zeros((BLOCK, M), tl.float32)
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        valid = (n < last)[:, None]
        ok = valid & (d < D)
        at = n.to(tl.int64)[:, None]
        x = tl.load(q + at * q_n + d, mask=ok, other=0.0).to(tl.float32)
        value = tl.load(v + at * v_n + d, mask=ok, other=0.0)
        grad = tl.load(go + at * go_n + d, mask=ok, other=0.0).to(tl.float32)
        code, passed = load_code(codes, n, valid, CODE)
        c = as_operand(code, EXACT)
        norm = tl.sum(code * total[None, :], 1) + tokens * (BITS + 1.0)
        y = dot_halves(c, s_high, s_low, value.to(tl.float32) * (BITS + 1.0), EXACT)
        grad /= norm[:, None]
        dnorm = -tl.sum(grad * y, 1) / norm
        if not QUERY:
            dv = dot_halves(c, ds_high, ds_low, grad * (BITS + 1.0), EXACT)
            tl.store(out + at * (heads * D) + d, dv.to(out.dtype.element_ty), mask=ok)
        dcode = dnorm[:, None] * total[None, :] + dtotal[None, :]
        dcode = dot_halves(grad, tl.trans(s_high), tl.trans(s_low), dcode, EXACT)
        dcode = dot_halves(operand(value, EXACT), tl.trans(ds_high), tl.trans(ds_low), dcode, EXACT)
        u, inverse = direction(x)
        distance, kernel = kernel_values(u, a, squares, mean)
        dkernel = multiply(tl.where(passed, dcode, 0.0), planes) * kernel
        if QUERY:
            ddistance = dmean - dkernel * (0.5 / mean)
            ddistance = tl.where(m < ANCHORS, ddistance, 0.0)
            du = multiply(-2.0 * ddistance, tl.trans(a))
            # A row of zeros was not divided, and its direction is zero: nothing is taken off.
            dx = (du - u * tl.sum(du * u, 1)[:, None]) * inverse[:, None]
            tl.store(out + at * (heads * D) + d, dx.to(out.dtype.element_ty), mask=ok)
        else:
            slope += dkernel * distance
    if not QUERY:
        total_slope = tl.sum(tl.sum(slope, 1), 0) * (0.5 / mean) / mean
        tl.store(slopes + bh.to(tl.int64) * tl.num_programs(1) + split, total_slope)


def backward(
    grad: Tensor,
    query: Tensor,
    value: Tensor,
    anchors: Tensor,
    hyperplanes: Tensor,
    codes: Tensor,
    state: Tensor,
    distances: Tensor,
    dquery: Tensor,
    dvalue: Tensor,
) -> None:
    """Write the gradients of query and value."""
    bits = hyperplanes.shape[1]
    how = plan(query.shape, query.dtype, query.device, anchors.shape[1], bits)
    options = {"dtype": torch.float32, "device": query.device}
    strides = (*grad.stride()[:3], *query.stride()[:3], *value.stride()[:3])
    parts = torch.empty(how.parts_of(how.state_gradient, how.bits, how.width + 1), **options)
    launch(
        _state_gradient, how.state_gradient,
        grad, value, codes, state, parts, *strides[:3], *strides[6:],
    )  # fmt: skip
    slopes = torch.empty(how.parts_of(how.value_gradient), **options)
    dstate = parts.sum(1)
    tensors = (grad, query, value, anchors, hyperplanes, codes, state, dstate, distances)
    launch(_token_gradient, how.value_gradient, *tensors, slopes, dvalue, *strides)
    launch(_token_gradient, how.query_gradient, *tensors, slopes.sum(1), dquery, *strides)
