"""The Triton kernels of `layer_norm` and `add_layer_norm`: a row lives in registers.

Backward takes a second look at the sum alone: mean and variance are cheaper to compute again
than to store. The gradients of the vectors are summed in a fixed order, in two stages, of which the
second is PyTorch's: it costs the host less than a launch of ours.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import launch, multiprocessors


@triton.jit
def _standardize(x, live, eps, C: tl.constexpr):
    """(x - mean) / sqrt(var + eps) and the factor, per row; zero beyond the last channel."""
    centered = tl.where(live, x - (tl.sum(x, 1) * (1.0 / C))[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(centered * centered, 1) * (1.0 / C) + eps)[:, None]
    return centered * factor, factor


@triton.jit(do_not_specialize=["tokens", "eps"])
def _forward(
    x, branch, weight, bias, total, norm, tokens, eps,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, P)[None, :]
    live = c < C
    ok = (n < tokens) & live
    at = n * C + c
    s = tl.load(x + at, mask=ok, other=0.0)
    if BRANCH:
        y = tl.load(branch + at, mask=ok, other=0.0)
        s = (s.to(tl.float32) + y.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, s, mask=ok)
    y, _ = _standardize(s.to(tl.float32), live, eps, C)
    y *= tl.load(weight + c, mask=live, other=0.0).to(tl.float32)
    y += tl.load(bias + c, mask=live, other=0.0).to(tl.float32)
    tl.store(norm + at, y.to(norm.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["tokens", "eps"])
def _backward(
    dtotal, dnorm, total, weight, dx, parts, tokens, eps,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    TOTAL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx, and this program's part (2, C) of the gradients of weight and bias."""
    row = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, P)[None, :]
    live = c < C
    w = tl.load(weight + c, mask=live, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, P), tl.float32)
    dbias = tl.zeros((ROWS, P), tl.float32)
    tiles = tl.cdiv(tokens, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        n = tile * ROWS + row
        ok = (n < tokens) & live
        at = n.to(tl.int64) * C + c
        s = tl.load(total + at, mask=ok, other=0.0).to(tl.float32)
        dy = tl.load(dnorm + at, mask=ok, other=0.0).to(tl.float32)
        y, inverse = _standardize(s, live, eps, C)
        dweight += dy * y
        dbias += dy
        dy *= w
        inner = (tl.sum(dy * y, 1) * (1.0 / C))[:, None]
        ds = inverse * (dy - (tl.sum(dy, 1) * (1.0 / C))[:, None] - y * inner)
        if TOTAL:
            ds += tl.load(dtotal + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(dx + at, ds.to(dx.dtype.element_ty), mask=ok)
    c = tl.arange(0, P)
    parts += tl.program_id(0).to(tl.int64) * (2 * C) + c
    tl.store(parts, tl.sum(dweight, 0), mask=c < C)
    tl.store(parts + C, tl.sum(dbias, 0), mask=c < C)


# Elements a program holds: 16 bytes a load and thread, and several rows in flight.
ELEMENTS = 4096
# Of the backward pass: programs a multiprocessor, and tiles that are fetched ahead, which pays
# as long as a tile has many rows.
RESIDENT = 2
STAGES, ROWS_WORTH_STAGES = 3, 32
WARPS = 4


@lru_cache
def _tiles(shape: torch.Size) -> tuple[int, int, int, int, int]:
    """Channels and the power of two that they are padded to, rows, rows a tile, and tiles."""
    channels = shape[-1]
    padded = triton.next_power_of_2(channels)
    tokens = shape.numel() // channels
    rows = max(1, ELEMENTS // padded)
    return channels, padded, tokens, rows, triton.cdiv(tokens, rows)


def forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    total: Tensor,
    norm: Tensor,
) -> None:
    """Write the sum to `total` if there is a branch, and its norm to `norm`."""
    channels, padded, tokens, rows, tiles = _tiles(x.shape)
    if not tokens:
        return
    launch(
        _forward, (tiles,),
        x, x if branch is None else branch, weight, bias, total, norm,
        tokens, eps,
        C=channels, P=padded, ROWS=rows, BRANCH=branch is not None, num_warps=WARPS,
    )  # fmt: skip


def backward(
    dtotal: Tensor | None, dnorm: Tensor, total: Tensor, weight: Tensor, eps: float, dx: Tensor
) -> Tensor:
    """Write the gradient of the sum (with `dtotal`, if there is one); those of weight and bias,
    (2, C) in float32."""
    channels, padded, tokens, rows, tiles = _tiles(total.shape)
    programs = min(tiles, RESIDENT * multiprocessors(total.device))
    stages = STAGES if rows >= ROWS_WORTH_STAGES else 1
    parts = torch.empty((programs, 2, channels), dtype=torch.float32, device=total.device)
    if programs:
        launch(
            _backward, (programs,),
            dnorm if dtotal is None else dtotal, dnorm, total, weight, dx, parts, tokens, eps,
            C=channels, P=padded, ROWS=rows, TOTAL=dtotal is not None, STAGES=stages,
            num_warps=WARPS,
        )  # fmt: skip
    return parts.sum(0)
