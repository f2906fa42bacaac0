"""The backward kernels of `attention_of_parts`; `plan.py` has their order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from ..runtime.mathematics import multiply, single
from .mathematics import SCALARS, load_keys, softmax_of
from .plan import plan


@triton.jit(do_not_specialize=SCALARS)
def _gradient(
    q, grad, first, first_local, second, second_local, dq, sums,
    q_b, q_n, g_b, g_n, dq_b, dq_n, tokens, per_split, keys, heads, scale,
    SHARES: tl.constexpr, D: tl.constexpr, P: tl.constexpr, KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    scale = single(scale)
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    share = tl.program_id(0) % SHARES
    h = tl.program_id(0) // SHARES % heads
    b = (tl.program_id(0) // SHARES // heads).to(tl.int64)
    q += b * q_b + (h * SHARES + share) * D
    dq += b * dq_b + (h * SHARES + share) * D
    grad += b * g_b + (share * heads + h) * D
    if share > 0:
        first = second
        first_local = second_local
    k, v, known = load_keys(first, first_local, b, h, keys, heads, D, P, KEYS)
    d = tl.arange(0, P)[None, :]
    dk = tl.zeros((KEYS, P), tl.float32)
    dv = tl.zeros((KEYS, P), tl.float32)
    start = tl.program_id(1) * per_split
    last = tl.minimum(start + per_split, tokens)
    for block in range(start, last, BLOCK):
        n = block + tl.arange(0, BLOCK)
        ok = (n < last)[:, None] & (d < D)
        at = n.to(tl.int64)[:, None]
        x = tl.load(q + at * q_n + d, mask=ok, other=0.0)
        g = tl.load(grad + at * g_n + d, mask=ok, other=0.0)
        weight, mass = softmax_of(x, k, known, scale, EXACT)
        weight /= mass
        slope = multiply(g, tl.trans(v))
        slope = weight * (slope - tl.sum(weight * slope, 1)[:, None])
        slope = slope.to(x.dtype)
        # The x and g of a missing token are zero.
        dv = multiply(tl.trans(weight.to(g.dtype)), g, dv)
        dk = multiply(tl.trans(slope), x, dk)
        y = multiply(slope, k) * scale
        tl.store(dq + at * dq_n + d, y.to(dq.dtype.element_ty), mask=ok)
    m = tl.arange(0, KEYS)
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    at = (place * keys + m)[:, None] * (2 * D) + d
    ok = (m < keys)[:, None] & (d < D)
    tl.store(sums + at, dk * scale, mask=ok)
    tl.store(sums + at + D, dv, mask=ok)


@triton.jit(do_not_specialize=SCALARS)
def _finish(
    sums, first, first_local, second, second_local, splits, keys, heads,
    SHARES: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values, and that of values again, of one head."""
    row = tl.program_id(0)
    share = row % SHARES
    h = row // SHARES % heads
    b = (row // SHARES // heads).to(tl.int64)
    if share > 0:
        first = second
        first_local = second_local
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    count = keys * (2 * D)
    sums += row.to(tl.int64) * splits * count
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(sums + split * count + at, mask=at < count, other=0.0)
    total = total.to(first.dtype.element_ty)
    d = at % (2 * D)
    place = ((b * keys + at // (2 * D)) * heads + h) * D
    tl.store(first + 2 * place + d, total, mask=at < count)
    tl.store(first_local + place + d - D, total, mask=(at < count) & (d >= D))


def backward(
    grad: Tensor, query: Tensor, dquery: Tensor, parts: list[Tensor], dparts: list[Tensor]
) -> None:
    """Write the gradients of the queries and of the parts, which are as in `forward`."""
    how = plan(query.shape, len(parts) // 2, parts[1].shape, query.dtype, query.device)
    sums = torch.empty(how.sums, dtype=torch.float32, device=query.device)
    launch(
        _gradient, how.gradient,
        query, grad, *parts[:2], *parts[-2:], dquery, sums,
        *query.stride()[:2], *grad.stride()[:2], *dquery.stride()[:2],
    )  # fmt: skip
    launch(_finish, how.finish, sums, *dparts[:2], *dparts[-2:])
