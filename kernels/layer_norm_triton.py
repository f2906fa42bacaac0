"""The Triton kernels of `layer_norm`, `add_layer_norm` and `scaled_add`: a row lives in registers.

Backward takes a second look at the sum alone: mean and variance are cheaper to compute again
than to store. The gradients of the vectors are summed in a fixed order, in two stages.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_math import sum_rows


@triton.jit
def _standardize(x, live, eps, C: tl.constexpr):
    """(x - mean) / sqrt(var + eps) and the factor, per row; zero beyond the last channel."""
    centered = tl.where(live, x - (tl.sum(x, 1) / C)[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(centered * centered, 1) / C + eps)[:, None]
    return centered * factor, factor


@triton.jit(do_not_specialize=["tokens", "eps"])
def _forward(
    x, branch, scale, weight, bias, total, norm, tokens, eps,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    BRANCH: tl.constexpr, SCALE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, P)[None, :]
    live = c < C
    ok = (n < tokens) & live
    at = n * C + c
    s = tl.load(x + at, mask=ok, other=0.0)
    if BRANCH:
        y = tl.load(branch + at, mask=ok, other=0.0).to(tl.float32)
        if SCALE:
            y *= tl.load(scale + c, mask=live, other=0.0).to(tl.float32)
        s = (s.to(tl.float32) + y).to(total.dtype.element_ty)
        tl.store(total + at, s, mask=ok)
    if NORM:
        y, _ = _standardize(s.to(tl.float32), live, eps, C)
        y *= tl.load(weight + c, mask=live, other=0.0).to(tl.float32)
        y += tl.load(bias + c, mask=live, other=0.0).to(tl.float32)
        tl.store(norm + at, y.to(norm.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["tokens", "eps"])
def _backward(
    dtotal, dnorm, total, branch, scale, weight, dx, dbranch, parts, tokens, eps,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    TOTAL: tl.constexpr, SCALE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """dx, dbranch and this program's part (3, P) of the gradients of scale, weight and bias."""
    row = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, P)[None, :]
    live = c < C
    if SCALE:
        factor = tl.load(scale + c, mask=live, other=0.0).to(tl.float32)
        dscale = tl.zeros((ROWS, P), tl.float32)
    if NORM:
        w = tl.load(weight + c, mask=live, other=0.0).to(tl.float32)
        dweight = tl.zeros((ROWS, P), tl.float32)
        dbias = tl.zeros((ROWS, P), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        n = tile * ROWS + row
        ok = (n < tokens) & live
        at = n.to(tl.int64) * C + c
        ds = tl.zeros((ROWS, P), tl.float32)
        if TOTAL:
            ds = tl.load(dtotal + at, mask=ok, other=0.0).to(tl.float32)
        if NORM:
            s = tl.load(total + at, mask=ok, other=0.0).to(tl.float32)
            dy = tl.load(dnorm + at, mask=ok, other=0.0).to(tl.float32)
            y, inverse = _standardize(s, live, eps, C)
            dweight += dy * y
            dbias += dy
            dy *= w
            inner = (tl.sum(dy * y, 1) / C)[:, None]
            ds += inverse * (dy - (tl.sum(dy, 1) / C)[:, None] - y * inner)
            tl.store(dx + at, ds.to(dx.dtype.element_ty), mask=ok)
        if SCALE:
            dscale += ds * tl.load(branch + at, mask=ok, other=0.0).to(tl.float32)
            tl.store(dbranch + at, (ds * factor).to(dbranch.dtype.element_ty), mask=ok)
    parts += tl.program_id(0).to(tl.int64) * (3 * P) + tl.arange(0, P)
    if SCALE:
        tl.store(parts, tl.sum(dscale, 0))
    if NORM:
        tl.store(parts + P, tl.sum(dweight, 0))
        tl.store(parts + 2 * P, tl.sum(dbias, 0))


@triton.jit(do_not_specialize=["count"])
def _sum_parts(
    parts, dscale, dweight, dbias, count,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(0) + FIRST
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = c < C
    total = sum_rows(parts + which * P, count, 3 * P, c, live, ROWS, BLOCK)
    if which == 0:
        tl.store(dscale + c, total.to(dscale.dtype.element_ty), mask=live)
    elif which == 1:
        tl.store(dweight + c, total.to(dweight.dtype.element_ty), mask=live)
    else:
        tl.store(dbias + c, total.to(dbias.dtype.element_ty), mask=live)


# Elements a program holds: 16 bytes a load and thread, and several rows in flight.
FORWARD_ELEMENTS = 4096
BACKWARD_ELEMENTS = 2048
RESIDENT = 4
WARPS = 4
# The sum of the programs' parts: many rows in flight, as it waits for little else.
SUM_ROWS, SUM_COLUMNS = 128, 16


@lru_cache
def _most_programs(device: torch.device) -> int:
    if device.type == "cpu":
        return 2  # Triton's interpreter: few programs, but more than one part
    return RESIDENT * torch.cuda.get_device_properties(device).multi_processor_count


def forward(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    total: Tensor,
    norm: Tensor,
) -> None:
    """Write the sum to `total` if there is a branch, and its norm to `norm` if a weight."""
    channels = x.shape[-1]
    padded = triton.next_power_of_2(channels)
    rows = max(1, FORWARD_ELEMENTS // padded)
    tokens = x.numel() // channels
    if not tokens:
        return
    _forward[(triton.cdiv(tokens, rows),)](
        x, x if branch is None else branch, x if scale is None else scale,
        x if weight is None else weight, x if bias is None else bias, total, norm, tokens, eps,
        C=channels, P=padded, ROWS=rows,
        BRANCH=branch is not None, SCALE=scale is not None, NORM=weight is not None,
        num_warps=WARPS,
    )  # fmt: skip


def backward(
    dtotal: Tensor | None,
    dnorm: Tensor | None,
    total: Tensor | None,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    eps: float,
    dx: Tensor,
    dbranch: Tensor,
    dscale: Tensor,
    dweight: Tensor,
    dbias: Tensor,
) -> None:
    """Write the gradients of scale and branch, if there is a scale, and, if the norm's gradient
    is there, those of x, weight and bias. (Without it the gradient of x is `dtotal`.)"""
    scaled, normed = scale is not None, dnorm is not None
    given = dtotal if dnorm is None else dnorm
    channels = given.shape[-1]
    padded = triton.next_power_of_2(channels)
    rows = max(1, BACKWARD_ELEMENTS // padded)
    tokens = given.numel() // channels
    programs = min(triton.cdiv(tokens, rows), _most_programs(given.device))
    parts = torch.empty((programs, 3, padded), dtype=torch.float32, device=given.device)
    if programs:
        _backward[(programs,)](
            given if dtotal is None else dtotal, given if dnorm is None else dnorm,
            given if total is None else total, given if branch is None else branch,
            given if scale is None else scale, given if weight is None else weight,
            dx, dbranch, parts, tokens, eps,
            C=channels, P=padded, ROWS=rows,
            TOTAL=dtotal is not None, SCALE=scaled, NORM=normed, num_warps=WARPS,
        )  # fmt: skip
    _sum_parts[(scaled + 2 * normed, triton.cdiv(channels, SUM_COLUMNS))](
        parts, dscale, dweight, dbias, programs,
        C=channels, P=padded, ROWS=SUM_ROWS, BLOCK=SUM_COLUMNS, FIRST=0 if scaled else 1,
        num_warps=WARPS,
    )  # fmt: skip
