"""The Triton kernels of a scaled `linear`: the gradients of its weight, bias and scale.

The bias's sum over rows is taken in two stages and a fixed order; the second is in the kernel that
turns the gradients of scale * W and scale * b into those of W, b and the scale, row by row of W.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import launch, multiprocessors


@triton.jit(do_not_specialize=["count", "per"])
def _sum_columns(
    rows, parts, count, per, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The sums over `per` rows of a block of columns."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    live = (c < channels)[None, :]
    first = tl.program_id(1) * per
    last = tl.minimum(first + per, count)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, last, ROWS):
        n = start + tl.arange(0, ROWS)[:, None]
        at = rows + n.to(tl.int64) * channels + c[None, :]
        total += tl.load(at, mask=(n < last) & live, other=0.0).to(tl.float32)
    at = parts + tl.program_id(1).to(tl.int64) * channels + c
    tl.store(at, tl.sum(total, 0), mask=c < channels)


@triton.jit(do_not_specialize=["count"])
def _unscale(
    dweight, parts, weight, bias, scale, dbias, dscale, count, channels, inputs,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row of W: its gradient, in place, and those of its bias and of its scale."""
    o = tl.program_id(0)
    factor = tl.load(scale + o).to(tl.float32)
    dweight += o.to(tl.int64) * inputs
    weight += o.to(tl.int64) * inputs
    inner = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, inputs, COLUMNS):
        i = start + tl.arange(0, COLUMNS)
        live = i < inputs
        g = tl.load(dweight + i, mask=live, other=0.0)
        inner += g * tl.load(weight + i, mask=live, other=0.0).to(tl.float32)
        tl.store(dweight + i, g * factor, mask=live)
    slope = tl.sum(inner, 0)
    if BIAS:
        row = tl.arange(0, ROWS)
        sums = tl.zeros((ROWS,), tl.float32)
        for start in range(0, count, ROWS):
            n = start + row
            sums += tl.load(parts + n.to(tl.int64) * channels + o, mask=n < count, other=0.0)
        g = tl.sum(sums, 0)
        slope += g * tl.load(bias + o).to(tl.float32)
        tl.store(dbias + o, (g * factor).to(dbias.dtype.element_ty))
    tl.store(dscale + o, slope.to(dscale.dtype.element_ty))


# Elements of a step: 16 bytes a load and thread, four of them under way.
ROWS, COLUMNS, WARPS = 64, 64, 4
# Programs a multiprocessor: enough loads under way to fill the memory's pipe.
RESIDENT = 8


@lru_cache
def _split(count: int, channels: int, multiprocessors: int) -> tuple[int, int, int]:
    """Blocks of columns, programs a block, and the rows of one."""
    blocks = triton.cdiv(channels, COLUMNS)
    steps = triton.cdiv(count, ROWS)
    per = triton.cdiv(steps, max(1, RESIDENT * multiprocessors // blocks)) * ROWS
    return blocks, triton.cdiv(count, per) if per else 0, per


def column_sums(rows: Tensor) -> Tensor:
    """Parts (P, C), in float32, of the sums over the rows of (N, C)."""
    count, channels = rows.shape
    blocks, programs, per = _split(count, channels, multiprocessors(rows.device))
    parts = torch.empty((programs, channels), dtype=torch.float32, device=rows.device)
    if programs:
        launch(
            _sum_columns, (blocks, programs),
            rows, parts, count, per, channels, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
        )  # fmt: skip
    return parts


def unscale(
    dweight: Tensor, parts: Tensor | None, weight: Tensor, bias: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients of W (in place), b and the scale, of scale * W's and, in parts, scale * b's."""
    channels, inputs = weight.shape
    dscale = torch.empty_like(scale)
    dbias = None if bias is None else torch.empty_like(bias)
    parts = dweight if parts is None else parts
    launch(
        _unscale, (channels,),
        dweight, parts, weight.contiguous(), scale if bias is None else bias, scale,
        dscale if bias is None else dbias, dscale, parts.shape[0], channels, inputs,
        BIAS=bias is not None, ROWS=128, COLUMNS=256, num_warps=2,
    )  # fmt: skip
    return dweight, dbias, dscale
