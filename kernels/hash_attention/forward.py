"""The forward kernels of `hash_attention`; `plan.py` has their order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from ..runtime.mathematics import dot_halves, multiply, operand
from .mathematics import (
    PASSED,
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
def _directions(
    q, parts, q_b, q_n, q_h, tokens, per_split, heads,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0)
    split = tl.program_id(1)
    q += (bh // heads).to(tl.int64) * q_b + (bh % heads) * q_h
    d = tl.arange(0, P)[None, :]
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    total = tl.zeros((BLOCK, P), tl.float32)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        ok = (n < last)[:, None] & (d < D)
        x = tl.load(q + n.to(tl.int64)[:, None] * q_n + d, mask=ok, other=0.0).to(tl.float32)
        u, _ = direction(x)
        total += u
    place = bh.to(tl.int64) * tl.num_programs(1) + split
    tl.store(parts + place * P + tl.arange(0, P), tl.sum(total, 0))


@triton.jit(do_not_specialize=SCALARS)
def _codes(
    q, v, anchors, means, hyperplanes, directions, codes, parts, distances,
    q_b, q_n, q_h, v_b, v_n, v_h, tokens, per_split, heads,
    D: tl.constexpr, P: tl.constexpr, ANCHORS: tl.constexpr, M: tl.constexpr,
    BITS: tl.constexpr, CODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0)
    split = tl.program_id(1)
    EXACT: tl.constexpr = v.dtype.element_ty == tl.float32
    h = bh % heads
    q += (bh // heads).to(tl.int64) * q_b + h * q_h
    v += (bh // heads).to(tl.int64) * v_b + h * v_h
    codes += bh.to(tl.int64) * tokens * CODE
    d = tl.arange(0, P)[None, :]
    m = tl.arange(0, M)
    bit = tl.arange(0, CODE)[None, :]
    a, squares = load_anchors(anchors, h, D, P, ANCHORS, M)
    total = tl.load(directions + bh.to(tl.int64) * P + tl.arange(0, P))
    mean = 1.0 + (tl.sum(squares, 0) - 2.0 * tl.sum(total * tl.sum(a, 1), 0) / tokens) / ANCHORS
    if split == 0:
        tl.store(distances + bh, mean)
    means = tl.load(means + h * ANCHORS + m, mask=m < ANCHORS, other=0.0)
    held = (m < ANCHORS)[:, None] & (bit < BITS)
    planes = tl.load(hyperplanes + (h * BITS + bit) * ANCHORS + m[:, None], mask=held, other=0.0)
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    state = tl.zeros((P, CODE), tl.float32)
    sums = tl.zeros((BLOCK, CODE), tl.float32)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        valid = (n < last)[:, None]
        at = n.to(tl.int64)[:, None]
        x = tl.load(q + at * q_n + d, mask=valid & (d < D), other=0.0).to(tl.float32)
        value = tl.load(v + at * v_n + d, mask=valid & (d < D), other=0.0)
        u, _ = direction(x)
        _, kernel = kernel_values(u, a, squares, mean)
        sides = multiply(kernel - means[None, :], planes)
        code = tl.where(sides > 0, 1, tl.where(sides < 0, -1, 0))
        kept = code + tl.where(tl.abs(sides) < 1.0, PASSED, 0)
        tl.store(codes + at * CODE + bit, kept.to(tl.int8), mask=valid)
        # A side that is not a number has no sign, and must not become a code of zero.
        code = tl.where(sides == sides, code.to(tl.float32), sides)
        code = tl.where(valid, code, 0.0)
        sums += code
        value = operand(value, EXACT)
        state = multiply(tl.trans(value), code.to(value.dtype), state)
    parts += (bh.to(tl.int64) * tl.num_programs(1) + split) * (CODE * (P + 1))
    row = tl.arange(0, CODE)
    tl.store(parts + row[None, :] * (P + 1) + tl.arange(0, P)[:, None], state)
    tl.store(parts + row * (P + 1) + P, tl.sum(sums, 0))


@triton.jit(do_not_specialize=SCALARS)
def _read(
    v, codes, state, out, v_b, v_n, v_h, tokens, per_split, heads,
    D: tl.constexpr, P: tl.constexpr, BITS: tl.constexpr, CODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0)
    EXACT: tl.constexpr = v.dtype.element_ty == tl.float32
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    v += b * v_b + h * v_h
    out += (b * tokens * heads + h) * D
    codes += bh.to(tl.int64) * tokens * CODE
    s_high, s_low, total = load_state(state + bh.to(tl.int64) * (CODE * (P + 1)), CODE, P, EXACT)
    d = tl.arange(0, P)[None, :]
    first = tl.program_id(1) * per_split
    last = tl.minimum(first + per_split, tokens)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        valid = (n < last)[:, None]
        ok = valid & (d < D)
        at = n.to(tl.int64)[:, None]
        value = tl.load(v + at * v_n + d, mask=ok, other=0.0).to(tl.float32)
        code, _ = load_code(codes, n, valid, CODE)
        norm = tl.sum(code * total[None, :], 1) + tokens * (BITS + 1.0)
        y = dot_halves(as_operand(code, EXACT), s_high, s_low, value * (BITS + 1.0), EXACT)
        y /= norm[:, None]
        tl.store(out + at * (heads * D) + d, y.to(out.dtype.element_ty), mask=ok)


def forward(
    query: Tensor,
    value: Tensor,
    anchors: Tensor,
    means: Tensor,
    hyperplanes: Tensor,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the result to `out`; return codes, state and mean distances."""
    bits = hyperplanes.shape[1]
    how = plan(query.shape, query.dtype, query.device, anchors.shape[1], bits)
    options = {"dtype": torch.float32, "device": query.device}
    strides = (*query.stride()[:3], *value.stride()[:3])
    parts = torch.empty(how.parts_of(how.directions, how.width), **options)
    launch(_directions, how.directions, query, parts, *strides[:3])
    codes = torch.empty((how.rows, query.shape[1], how.bits), dtype=torch.int8, device=query.device)
    distances = torch.empty(how.rows, **options)
    states = torch.empty(how.parts_of(how.codes, how.bits, how.width + 1), **options)
    launch(
        _codes, how.codes,
        query, value, anchors, means, hyperplanes, parts.sum(1), codes, states, distances, *strides,
    )  # fmt: skip
    state = states.sum(1)
    launch(_read, how.read, value, codes, state, out, *strides[3:])
    return codes, state, distances
