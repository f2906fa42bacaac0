"""The Triton kernels of the gradient of the focused power map.

Backward reads the inputs alone, and computes the norms again. With t as in
`focused_linear_attention`, f its map and a = sum(g f) over the channels, of g the gradient of f,

    w = p f g + a ((t / ||t||)^2 - p (t^p / ||t^p||)^2)

is t times the gradient of t; so that of x is w / (relu(x) + 1e-6) where x > 0, and that of s
sums -w sigmoid(s) / softplus(s) over the tokens, in a fixed order, in two stages.

Queries and keys are one launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from ..runtime.mathematics import exponential, fold, reciprocal_approximate, sum_rows
from .forward import flatten_tokens
from .mathematics import EPSILON, divisor, powers_of, softplus
from .plan import plan


@triton.jit(do_not_specialize=["count"])
def _backward(
    gq, gk, q, k, scale, dq, dk, parts, q_n, k_n, count,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, POWER: tl.constexpr,
    FOLD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq or dk, and this program's part (P,) of the sum of w."""
    if tl.program_id(1) == 0:
        g, x, dx, x_n = gq, q, dq, q_n
    else:
        g, x, dx, x_n = gk, k, dk, k_n
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    row = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, P)[None, :]
    live = c < C
    inverse = divisor(scale, c, live)
    total = tl.zeros((FOLD, P), tl.float32)
    tiles = tl.cdiv(count, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        n = (tile * ROWS + row).to(tl.int64)
        ok = (n < count) & live
        value = tl.load(x + n * x_n + c, mask=ok, other=0.0).to(tl.float32)
        gradient = tl.load(g + n * C + c, mask=ok, other=0.0).to(tl.float32)
        t, powers, square, square_of_powers, norm = powers_of(value, inverse, POWER)
        gradient *= norm[:, None] * powers
        a = tl.sum(gradient, 1)
        w = POWER * gradient + (a / square)[:, None] * (t * t)
        w -= (POWER * a / square_of_powers)[:, None] * (powers * powers)
        total += fold(w, FOLD)
        if EXACT:
            w /= tl.maximum(value, 0.0) + EPSILON
        else:
            w *= reciprocal_approximate(tl.maximum(value, 0.0) + EPSILON)
        tl.store(dx + n * C + c, tl.where(value > 0, w, 0.0).to(dx.dtype.element_ty), mask=ok)
    place = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(parts + place * P + tl.arange(0, P), tl.sum(total, 0))


@triton.jit(do_not_specialize=["count"])
def _scale_gradient(
    parts, scale, dscale, count,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = c < C
    total = sum_rows(parts, count, P, c, live, ROWS, BLOCK)
    s = tl.load(scale + c, mask=live, other=0.0).to(tl.float32)
    e = exponential(-tl.abs(s), True)
    sigmoid = tl.where(s > 0, 1.0, e) / (1.0 + e)
    total *= -sigmoid / softplus(s)
    tl.store(dscale + c, total.to(dscale.dtype.element_ty), mask=live)


def backward(
    grad_query: Tensor,
    grad_key: Tensor,
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    power: int,
    dquery: Tensor,
    dkey: Tensor,
    dscale: Tensor,
) -> None:
    """Write the gradients of query, key and scale from those of the features."""
    query, key, scale = flatten_tokens(query), flatten_tokens(key), scale.contiguous()
    how = plan(scale.numel(), len(query), query.stride(0), key.stride(0), power, query.device)
    parts = torch.empty(how.parts, dtype=torch.float32, device=query.device)
    launch(_backward, how.backward, grad_query, grad_key, query, key, scale, dquery, dkey, parts)
    launch(_scale_gradient, how.scale_gradient, parts, scale, dscale)
