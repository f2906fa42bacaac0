"""The Triton kernels of `batch_norm`: of a map's pixels as rows of channels.

    forward     gather      a mean and a sum of squares about it, per program
                combine     theirs, in a fixed order; the running statistics
                normalize
    backward    sums        of the norm's gradient and of its product with the norm, per program
                input gradient

Squares are summed about a running mean (Welford): with the mean far from zero, sums of squares
would cancel. The norm and its activation are computed again from the map, not kept.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import launch, multiprocessors
from .triton_math import activate, gelu_gradient


@triton.jit
def _normed(x, statistics, c, live, C: tl.constexpr):
    """(x - mean) / deviation."""
    mean = tl.load(statistics + c, mask=live, other=0.0)
    return (x - mean) * tl.load(statistics + C + c, mask=live, other=0.0)


@triton.jit
def _norm_gradient(grad, norm, w, b, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """The gradient of norm * w + b, of that of its activation."""
    if ACTIVATION == "gelu":
        return grad * gelu_gradient(norm * w + b, EXACT)
    elif ACTIVATION == "relu":
        return tl.where(norm * w + b > 0, grad, 0.0)
    else:
        return grad


@triton.jit(do_not_specialize=["pixels"])
def _gather(
    x, parts, pixels,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """This program's part (3, C): means, sums of squares about them, and the count of pixels."""
    row = tl.arange(0, ROWS)
    c = tl.arange(0, P)[None, :]
    mean = tl.zeros((ROWS, P), tl.float32)
    squares = tl.zeros((ROWS, P), tl.float32)
    counts = tl.zeros((ROWS,), tl.float32)
    seen = 0.0
    tiles = tl.cdiv(pixels, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        n = tile * ROWS + row
        valid = n < pixels
        ok = valid[:, None] & (c < C)
        value = tl.load(x + n.to(tl.int64)[:, None] * C + c, mask=ok, other=0.0).to(tl.float32)
        seen += 1.0
        counts += tl.where(valid, 1.0, 0.0)
        # Only the last tile has rows beyond the map, so what they would add is left out there.
        distance = tl.where(ok, value - mean, 0.0)
        mean += distance * (1.0 / seen)
        squares += distance * (value - mean)
    count = tl.sum(counts, 0)
    center = tl.sum(mean * counts[:, None], 0) / count
    distance = mean - center[None, :]
    squares += distance * distance * counts[:, None]
    c = tl.arange(0, P)
    parts += tl.program_id(0).to(tl.int64) * (3 * C) + c
    tl.store(parts, center, mask=c < C)
    tl.store(parts + C, tl.sum(squares, 0), mask=c < C)
    tl.store(parts + 2 * C, tl.zeros((P,), tl.float32) + count, mask=c < C)


@triton.jit(do_not_specialize=["count", "pixels", "momentum", "eps"])
def _combine(
    parts, offset, running_mean, running_var, statistics, count, pixels, momentum, eps,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Means and 1 / deviations (2, C), and the running statistics."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    live = c < C
    row = tl.arange(0, ROWS)[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, ROWS):
        at = parts + (start + row).to(tl.int64) * (3 * C) + c[None, :]
        ok = (start + row < count) & live[None, :]
        total += tl.load(at, mask=ok, other=0.0) * tl.load(at + 2 * C, mask=ok, other=0.0)
    mean = tl.sum(total, 0) / pixels
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, ROWS):
        at = parts + (start + row).to(tl.int64) * (3 * C) + c[None, :]
        ok = (start + row < count) & live[None, :]
        distance = tl.load(at, mask=ok, other=0.0) - mean[None, :]
        total += tl.load(at + C, mask=ok, other=0.0)
        total += distance * distance * tl.load(at + 2 * C, mask=ok, other=0.0)
    squares = tl.sum(total, 0)
    tl.store(statistics + c, mean, mask=live)
    tl.store(statistics + C + c, tl.rsqrt(squares / pixels + eps), mask=live)
    if OFFSET:
        mean += tl.load(offset + c, mask=live, other=0.0).to(tl.float32)
    before = tl.load(running_mean + c, mask=live, other=0.0).to(tl.float32)
    after = before + momentum * (mean - before)
    tl.store(running_mean + c, after.to(running_mean.dtype.element_ty), mask=live)
    before = tl.load(running_var + c, mask=live, other=0.0).to(tl.float32)
    after = before + momentum * (squares / (pixels - 1.0) - before)
    tl.store(running_var + c, after.to(running_var.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["pixels"])
def _normalize(
    x, statistics, weight, bias, out, pixels,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, P)[None, :]
    live = c < C
    ok = (n < pixels) & live
    value = tl.load(x + n * C + c, mask=ok, other=0.0).to(tl.float32)
    y = _normed(value, statistics, c, live, C)
    y *= tl.load(weight + c, mask=live, other=0.0).to(tl.float32)
    y += tl.load(bias + c, mask=live, other=0.0).to(tl.float32)
    y = activate(y, ACTIVATION, EXACT)
    tl.store(out + n * C + c, y.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["pixels"])
def _gradient_sums(
    grad, x, statistics, weight, bias, parts, pixels,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """This program's part (2, C) of the gradients of bias and weight."""
    row = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, P)[None, :]
    live = c < C
    w = tl.load(weight + c, mask=live, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=live, other=0.0).to(tl.float32)
    dbias = tl.zeros((ROWS, P), tl.float32)
    dweight = tl.zeros((ROWS, P), tl.float32)
    tiles = tl.cdiv(pixels, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        n = tile * ROWS + row
        ok = (n < pixels) & live
        at = n.to(tl.int64) * C + c
        norm = _normed(tl.load(x + at, mask=ok, other=0.0).to(tl.float32), statistics, c, live, C)
        dy = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
        dy = _norm_gradient(dy, norm, w, b, ACTIVATION, EXACT)
        dbias += dy
        dweight += dy * norm
    c = tl.arange(0, P)
    parts += tl.program_id(0).to(tl.int64) * (2 * C) + c
    tl.store(parts, tl.sum(dbias, 0), mask=c < C)
    tl.store(parts + C, tl.sum(dweight, 0), mask=c < C)


@triton.jit(do_not_specialize=["pixels"])
def _input_gradient(
    grad, x, statistics, weight, bias, sums, dx, pixels,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, P)[None, :]
    live = c < C
    ok = (n < pixels) & live
    at = n * C + c
    norm = _normed(tl.load(x + at, mask=ok, other=0.0).to(tl.float32), statistics, c, live, C)
    dy = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
    w = tl.load(weight + c, mask=live, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=live, other=0.0).to(tl.float32)
    dy = _norm_gradient(dy, norm, w, b, ACTIVATION, EXACT)
    mean = tl.load(sums + c, mask=live, other=0.0) / pixels
    slope = tl.load(sums + C + c, mask=live, other=0.0) / pixels
    factor = w * tl.load(statistics + C + c, mask=live, other=0.0)
    tl.store(dx + at, (factor * (dy - mean - norm * slope)).to(dx.dtype.element_ty), mask=ok)


# Elements of a tile: of the kernels that sum, with programs a multiprocessor and tiles that are
# fetched ahead, and of those that write a map.
SUM_ELEMENTS, RESIDENT, STAGES = 4096, 2, 3
MAP_ELEMENTS = 2048
WARPS = 4
# The sum of the programs' parts, as of the depthwise convolution's.
SUM_ROWS, SUM_COLUMNS = 256, 16


@lru_cache
def _plan(shape: torch.Size, elements: int) -> tuple[int, int, dict]:
    """Pixels, tiles, and the sizes of one."""
    channels = shape[1]
    padded = triton.next_power_of_2(channels)
    pixels = shape.numel() // channels
    rows = max(1, elements // padded)
    sizes = {"C": channels, "P": padded, "ROWS": rows, "num_warps": WARPS}
    return pixels, triton.cdiv(pixels, rows), sizes


def gather(
    x: Tensor,
    offset: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    statistics: Tensor,
) -> None:
    """Write the means of `x`, (B, C, H, W) in the channels-last format, and 1 / deviations to
    `statistics`, (2, C), and move the running ones."""
    pixels, tiles, sizes = _plan(x.shape, SUM_ELEMENTS)
    programs = min(tiles, RESIDENT * multiprocessors(x.device))
    channels = x.shape[1]
    parts = torch.empty((programs, 3, channels), dtype=torch.float32, device=x.device)
    launch(_gather, (programs,), x, parts, pixels, STAGES=STAGES, **sizes)
    launch(
        _combine, (triton.cdiv(channels, SUM_COLUMNS),),
        parts, running_mean if offset is None else offset, running_mean, running_var, statistics,
        programs, pixels, momentum, eps,
        C=channels, ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, OFFSET=offset is not None, num_warps=WARPS,
    )  # fmt: skip


def normalize(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str | None,
    out: Tensor,
) -> None:
    """Write the activated norm of `x` to `out`."""
    pixels, tiles, sizes = _plan(x.shape, MAP_ELEMENTS)
    launch(
        _normalize, (tiles,), x, statistics, weight, bias, out, pixels,
        ACTIVATION=activation, EXACT=x.element_size() == 4, **sizes,
    )  # fmt: skip


def backward(
    grad: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str | None,
    dx: Tensor,
) -> Tensor:
    """Write the gradient of `x`; those of bias and weight, (2, C) in float32."""
    pixels, tiles, sizes = _plan(x.shape, SUM_ELEMENTS)
    programs = min(tiles, RESIDENT * multiprocessors(x.device))
    parts = torch.empty((programs, 2, x.shape[1]), dtype=torch.float32, device=x.device)
    options = {"ACTIVATION": activation, "EXACT": x.element_size() == 4}
    launch(
        _gradient_sums, (programs,), grad, x, statistics, weight, bias, parts, pixels,
        STAGES=STAGES, **options, **sizes,
    )  # fmt: skip
    sums = parts.sum(0)
    pixels, tiles, sizes = _plan(x.shape, MAP_ELEMENTS)
    launch(
        _input_gradient, (tiles,), grad, x, statistics, weight, bias, sums, dx, pixels,
        **options, **sizes,
    )  # fmt: skip
    return sums
