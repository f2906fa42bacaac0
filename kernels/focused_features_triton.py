"""The Triton kernels of `focused_features`: a token lives in registers.

Backward reads the inputs alone, and computes the norms again. With t as in `focused_features`,
f its map and a = sum(g f) over the channels, of g the gradient of f,

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

from .triton_launch import launch, multiprocessors
from .triton_math import exponential, sum_rows

EPSILON = tl.constexpr(1e-6)


@triton.jit
def _softplus(s):
    """log(1 + exp(s)), to rounding: exp(s) where that is small."""
    e = exponential(-tl.abs(s), True)
    one = 1.0 + e
    return tl.maximum(s, 0.0) + tl.where(one == 1.0, e, tl.log(one) * e / (one - 1.0 + 1e-30))


@triton.jit
def _directions(x, softplus, live, POWER: tl.constexpr):
    """t / ||t||, t^p / ||t^p||, and ||t||; zero beyond the last channel."""
    t = tl.where(live, (tl.maximum(x, 0.0) + EPSILON) / softplus, 0.0)
    largest = tl.max(t, 1)[:, None]
    t /= largest  # else powers and their squares leave the range of float32
    powers = t
    for _ in tl.static_range(POWER - 1):
        powers *= t
    norm = tl.sqrt(tl.sum(t * t, 1))[:, None]
    return t / norm, powers / tl.sqrt(tl.sum(powers * powers, 1))[:, None], norm * largest


@triton.jit(do_not_specialize=["q_count", "k_count"])
def _forward(
    q, k, scale, fq, fk, q_n, k_n, q_count, k_count,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        x, out, x_n, count = q, fq, q_n, q_count
    else:
        x, out, x_n, count = k, fk, k_n, k_count
    c = tl.arange(0, P)[None, :]
    live = c < C
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    ok = (n < count) & live
    softplus = _softplus(tl.load(scale + c, mask=live, other=0.0).to(tl.float32))
    value = tl.load(x + n * x_n + c, mask=ok, other=0.0).to(tl.float32)
    _, direction, norm = _directions(value, softplus, live, POWER)
    tl.store(out + n * C + c, (norm * direction).to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["q_count", "k_count"])
def _backward(
    gq, gk, q, k, scale, dq, dk, parts, q_n, k_n, q_count, k_count,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, POWER: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dq or dk, and this program's part (P,) of the sum of w."""
    if tl.program_id(1) == 0:
        g, x, dx, x_n, count = gq, q, dq, q_n, q_count
    else:
        g, x, dx, x_n, count = gk, k, dk, k_n, k_count
    row = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, P)[None, :]
    live = c < C
    softplus = _softplus(tl.load(scale + c, mask=live, other=0.0).to(tl.float32))
    total = tl.zeros((ROWS, P), tl.float32)
    tiles = tl.cdiv(count, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        n = (tile * ROWS + row).to(tl.int64)
        ok = (n < count) & live
        value = tl.load(x + n * x_n + c, mask=ok, other=0.0).to(tl.float32)
        gradient = tl.load(g + n * C + c, mask=ok, other=0.0).to(tl.float32)
        t, powers, norm = _directions(value, softplus, live, POWER)
        gradient *= norm * powers
        a = tl.sum(gradient, 1)[:, None]
        w = POWER * gradient + a * (t * t - POWER * powers * powers)
        total += w
        w = tl.where(value > 0, w / (value + EPSILON), 0.0)
        tl.store(dx + n * C + c, w.to(dx.dtype.element_ty), mask=ok)
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


# As in layer_norm_triton: elements a program holds, programs a multiprocessor in the backward
# pass, tiles fetched ahead where a tile has many rows, and the tile that sums the parts.
ELEMENTS = 4096
RESIDENT = 2
STAGES, ROWS_WORTH_STAGES = 3, 32
WARPS = 4
SUM_ROWS, SUM_COLUMNS = 128, 16


@lru_cache
def _tiles(channels: int, tokens: int) -> tuple[int, int, int]:
    """The power of two that channels are padded to, rows a tile, and tiles."""
    padded = triton.next_power_of_2(channels)
    rows = max(1, ELEMENTS // padded)
    return padded, rows, triton.cdiv(tokens, rows)


def _rows(x: Tensor) -> Tensor:
    """`x` as (tokens, C), a view of whatever has one step from token to token."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(
    query: Tensor, key: Tensor, scale: Tensor, power: int, fquery: Tensor, fkey: Tensor
) -> None:
    """Write the features of query and key to `fquery` and `fkey`."""
    query, key = _rows(query), _rows(key)
    padded, rows, tiles = _tiles(scale.numel(), max(len(query), len(key)))
    if tiles:
        launch(
            _forward, (tiles, 2),
            query, key, scale.contiguous(), fquery, fkey,
            query.stride(0), key.stride(0), len(query), len(key),
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
    padded, rows, tiles = _tiles(channels, max(len(query), len(key)))
    programs = min(tiles, RESIDENT * multiprocessors(query.device))
    parts = torch.empty((2 * programs, padded), dtype=torch.float32, device=query.device)
    if programs:
        launch(
            _backward, (programs, 2),
            grad_query.contiguous(), grad_key.contiguous(), query, key, scale, dquery, dkey, parts,
            query.stride(0), key.stride(0), len(query), len(key),
            C=channels, P=padded, ROWS=rows, POWER=power,
            STAGES=STAGES if rows >= ROWS_WORTH_STAGES else 1, num_warps=WARPS,
        )  # fmt: skip
    launch(
        _scale_gradient, (-(-channels // SUM_COLUMNS),),
        parts, scale, dscale, 2 * programs,
        C=channels, P=padded, ROWS=SUM_ROWS, BLOCK=SUM_COLUMNS, num_warps=WARPS,
    )  # fmt: skip
