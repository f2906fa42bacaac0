"""The forward kernels of `batch_norm`; `plan.py` has their order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from ..runtime.mathematics import activate
from .plan import plan, plan_merge


@triton.jit
def standardize(x, statistics, c, live, C: tl.constexpr):
    """(x - mean) / deviation."""
    mean = tl.load(statistics + c, mask=live, other=0.0)
    return (x - mean) * tl.load(statistics + C + c, mask=live, other=0.0)


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


@triton.jit
def _merge_parts(parts, count, c, live, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Mean, sum of squares about it, and number of values of `count` parts (3, C)."""
    row = tl.arange(0, ROWS)[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    values = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, ROWS):
        at = parts + (start + row).to(tl.int64) * (3 * C) + c[None, :]
        ok = (start + row < count) & live[None, :]
        size = tl.load(at + 2 * C, mask=ok, other=0.0)
        total += tl.load(at, mask=ok, other=0.0) * size
        values += size
    # Beyond the last channel there are no values.
    pixels = tl.maximum(tl.sum(values, 0), 1.0)
    mean = tl.sum(total, 0) / pixels
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, ROWS):
        at = parts + (start + row).to(tl.int64) * (3 * C) + c[None, :]
        ok = (start + row < count) & live[None, :]
        distance = tl.load(at, mask=ok, other=0.0) - mean[None, :]
        total += tl.load(at + C, mask=ok, other=0.0)
        total += distance * distance * tl.load(at + 2 * C, mask=ok, other=0.0)
    return mean, tl.sum(total, 0), pixels


@triton.jit(do_not_specialize=["count"])
def _reduce(parts, out, count, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One part (3, C) of many."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    live = c < C
    mean, squares, pixels = _merge_parts(parts, count, c, live, C, ROWS, COLUMNS)
    tl.store(out + c, mean, mask=live)
    tl.store(out + C + c, squares, mask=live)
    tl.store(out + 2 * C + c, pixels, mask=live)


@triton.jit(do_not_specialize=["count", "momentum", "eps"])
def _merge(
    parts, running_mean, running_var, statistics, count, momentum, eps,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Means, 1 / deviations and numbers of values (3, C), and the running statistics."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    live = c < C
    mean, squares, pixels = _merge_parts(parts, count, c, live, C, ROWS, COLUMNS)
    tl.store(statistics + c, mean, mask=live)
    tl.store(statistics + C + c, tl.rsqrt(squares / pixels + eps), mask=live)
    tl.store(statistics + 2 * C + c, pixels, mask=live)
    before = tl.load(running_mean + c, mask=live, other=0.0).to(tl.float32)
    after = before + momentum * (mean - before)
    tl.store(running_mean + c, after.to(running_mean.dtype.element_ty), mask=live)
    before = tl.load(running_var + c, mask=live, other=0.0).to(tl.float32)
    after = before + momentum * (squares / (pixels - 1.0) - before)
    tl.store(running_var + c, after.to(running_var.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["pixels"])
def _normalize(
    x, statistics, weight, bias, residual, addend, out, pixels,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr, EXACT: tl.constexpr,
    RESIDUAL: tl.constexpr, ADDEND: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, P)[None, :]
    live = c < C
    ok = (n < pixels) & live
    value = tl.load(x + n * C + c, mask=ok, other=0.0).to(tl.float32)
    y = standardize(value, statistics, c, live, C)
    y *= tl.load(weight + c, mask=live, other=0.0).to(tl.float32)
    y += tl.load(bias + c, mask=live, other=0.0).to(tl.float32)
    y = activate(y, ACTIVATION, EXACT)
    if RESIDUAL:
        y += tl.load(residual + c, mask=live, other=0.0).to(tl.float32) * value
    if ADDEND:
        y += tl.load(addend + n * C + c, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + n * C + c, y.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["pixels", "eps"])
def _normalize_running(
    x, running_mean, running_var, weight, bias, out, pixels, eps,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, P)[None, :]
    live = c < C
    ok = (n < pixels) & live
    mean = tl.load(running_mean + c, mask=live, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.load(running_var + c, mask=live, other=0.0).to(tl.float32) + eps)
    factor *= tl.load(weight + c, mask=live, other=0.0).to(tl.float32)
    y = (tl.load(x + n * C + c, mask=ok, other=0.0).to(tl.float32) - mean) * factor
    y += tl.load(bias + c, mask=live, other=0.0).to(tl.float32)
    y = activate(y, ACTIVATION, EXACT)
    tl.store(out + n * C + c, y.to(out.dtype.element_ty), mask=ok)


def gather(x: Tensor) -> Tensor:
    """Parts (programs, 3, C) of the statistics of `x`, (B, C, H, W) in the channels-last format."""
    how = plan(x.shape, x.dtype, x.device)
    parts = torch.empty((how.programs, 3, x.shape[1]), dtype=torch.float32, device=x.device)
    launch(_gather, how.gather, x, parts)
    return parts


def reduce(parts: Tensor) -> Tensor:
    """One part (3, C): means, sums of squares about them, and numbers of values."""
    out = torch.empty(parts.shape[1:], dtype=torch.float32, device=parts.device)
    launch(_reduce, plan_merge(len(parts), parts.shape[2]).reduce, parts, out)
    return out


def merge(
    parts: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> Tensor:
    """Means, 1 / deviations and numbers of values, (3, C); moves the running statistics."""
    statistics = torch.empty(parts.shape[1:], dtype=torch.float32, device=parts.device)
    how = plan_merge(len(parts), parts.shape[2], momentum, eps).merge
    launch(_merge, how, parts, running_mean, running_var, statistics)
    return statistics


def normalize(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    addend: Tensor | None,
    activation: str | None,
    out: Tensor,
) -> None:
    """Write the activation of the norm of `x`, plus residual * x and `addend`, to `out`."""
    how = plan(
        x.shape, x.dtype, x.device, activation,
        residual=residual is not None, addend=addend is not None,
    ).normalize  # fmt: skip
    residual, addend = (weight if residual is None else residual), (x if addend is None else addend)
    launch(_normalize, how, x, statistics, weight, bias, residual, addend, out)


def normalize_running(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: str | None,
    out: Tensor,
) -> None:
    """Write the activation of the norm of `x` with the running statistics to `out`."""
    how = plan(x.shape, x.dtype, x.device, activation, eps).normalize_running
    launch(_normalize_running, how, x, running_mean, running_var, weight, bias, out)
