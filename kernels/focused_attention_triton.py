"""The Triton kernels of the focused power map: a token, of all its heads, lives in registers.

Backward reads the inputs alone, and computes the norms again. With t as in
`focused_linear_attention`, f its map and a = sum(g f) over the channels, of g the gradient of f,

    w = p f g + a ((t / ||t||)^2 - p (t^p / ||t^p||)^2)

is t times the gradient of t; so that of x is w / (relu(x) + 1e-6) where x > 0, and that of s
sums -w sigmoid(s) / softplus(s) over the tokens, in a fixed order, in two stages.

Queries and keys are one launch: the second axis of its grid.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import rows_contiguous
from .triton_launch import launch, multiprocessors
from .triton_math import exponential, fold, reciprocal_approximate, sum_rows

EPSILON = tl.constexpr(1e-6)


@triton.jit
def _softplus(s):
    """log(1 + exp(s)), to rounding: exp(s) where that is small."""
    e = exponential(-tl.abs(s), True)
    one = 1.0 + e
    return tl.maximum(s, 0.0) + tl.where(one == 1.0, e, tl.log(one) * e / (one - 1.0 + 1e-30))


@triton.jit
def _divisor(scale, c, live):
    """1 / softplus(s), zero beyond the last channel."""
    s = tl.load(scale + c, mask=live, other=0.0).to(tl.float32)
    return tl.where(live, 1.0 / _softplus(s), 0.0)


@triton.jit
def _powers(x, inverse, POWER: tl.constexpr):
    """t over its maximum, and that to the power p; the sums of their squares; and the norm of f
    over the norm of the second."""
    t = (tl.maximum(x, 0.0) + EPSILON) * inverse
    largest = tl.max(t, 1)
    t *= (1.0 / largest)[:, None]  # else powers and their squares leave the range of float32
    powers = t
    for _ in tl.static_range(POWER - 1):
        powers *= t
    square = tl.sum(t * t, 1)
    square_of_powers = tl.sum(powers * powers, 1)
    return t, powers, square, square_of_powers, largest * tl.sqrt(square / square_of_powers)


@triton.jit(do_not_specialize=["count"])
def _forward(
    q, k, scale, fq, fk, q_n, k_n, count,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        x, out, x_n = q, fq, q_n
    else:
        x, out, x_n = k, fk, k_n
    row = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, P)[None, :]
    live = c < C
    inverse = _divisor(scale, c, live)
    for tile in tl.range(tl.program_id(0), tl.cdiv(count, ROWS), tl.num_programs(0)):
        n = (tile * ROWS + row).to(tl.int64)
        ok = (n < count) & live
        value = tl.load(x + n * x_n + c, mask=ok, other=0.0).to(tl.float32)
        _, powers, _, _, norm = _powers(value, inverse, POWER)
        tl.store(out + n * C + c, (norm[:, None] * powers).to(out.dtype.element_ty), mask=ok)


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
    inverse = _divisor(scale, c, live)
    total = tl.zeros((FOLD, P), tl.float32)
    tiles = tl.cdiv(count, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        n = (tile * ROWS + row).to(tl.int64)
        ok = (n < count) & live
        value = tl.load(x + n * x_n + c, mask=ok, other=0.0).to(tl.float32)
        gradient = tl.load(g + n * C + c, mask=ok, other=0.0).to(tl.float32)
        t, powers, square, square_of_powers, norm = _powers(value, inverse, POWER)
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
    total *= -sigmoid / _softplus(s)
    tl.store(dscale + c, total.to(dscale.dtype.element_ty), mask=live)


# Elements a program holds, and programs a multiprocessor for each of queries and keys: forward,
# and backward, which has twice as much in registers. Then the tile that sums the parts.
FORWARD_ELEMENTS, FORWARD_RESIDENT = 4096, 4
BACKWARD_ELEMENTS, BACKWARD_RESIDENT = 2048, 2
STAGES = 1
WARPS = 4
THREAD_ROWS = 2  # that one thread has of a backward tile: 16 bytes of each
SUM_ROWS, SUM_COLUMNS = 128, 16


@lru_cache
def _grid(
    channels: int, tokens: int, elements: int, resident: int, device: torch.device
) -> tuple[int, int, int]:
    """The power of two that channels are padded to, tokens a tile, and programs."""
    padded = triton.next_power_of_2(channels)
    rows = max(1, elements // padded)
    return padded, rows, min(triton.cdiv(tokens, rows), resident * multiprocessors(device))


def _rows(x: Tensor) -> Tensor:
    """`x` (B, N, heads, D) as (B * N, C): a view wherever one step leads from token to token."""
    return rows_contiguous(x.reshape(-1, x.shape[2] * x.shape[3]))


def forward(
    query: Tensor, key: Tensor, scale: Tensor, power: int, fquery: Tensor, fkey: Tensor
) -> None:
    """Write the features of query and key to `fquery` and `fkey`."""
    query, key = _rows(query), _rows(key)
    padded, rows, programs = _grid(
        scale.numel(), len(query), FORWARD_ELEMENTS, FORWARD_RESIDENT, query.device
    )
    if programs:
        launch(
            _forward, (programs, 2),
            query, key, scale.contiguous(), fquery, fkey,
            query.stride(0), key.stride(0), len(query),
            C=scale.numel(), P=padded, ROWS=rows, POWER=power, num_warps=WARPS,
        )  # fmt: skip


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
    query, key, scale = _rows(query), _rows(key), scale.contiguous()
    channels = scale.numel()
    padded, rows, programs = _grid(
        channels, len(query), BACKWARD_ELEMENTS, BACKWARD_RESIDENT, query.device
    )
    parts = torch.empty((2 * programs, padded), dtype=torch.float32, device=query.device)
    if programs:
        launch(
            _backward, (programs, 2),
            grad_query, grad_key, query, key, scale, dquery, dkey, parts,
            query.stride(0), key.stride(0), len(query),
            C=channels, P=padded, ROWS=rows, POWER=power,
            FOLD=max(1, rows // THREAD_ROWS), STAGES=STAGES, num_warps=WARPS,
        )  # fmt: skip
    launch(
        _scale_gradient, (-(-channels // SUM_COLUMNS),),
        parts, scale, dscale, 2 * programs,
        C=channels, P=padded, ROWS=SUM_ROWS, BLOCK=SUM_COLUMNS, num_warps=WARPS,
    )  # fmt: skip
