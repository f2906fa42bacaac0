"""The Triton kernels of a convolution's bias: added in place, and its gradient.

The gradient is a sum over pixels in two stages and a fixed order; the second stage is PyTorch's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from ..runtime.mathematics import activate
from .plan import plan


@triton.jit(do_not_specialize=["pixels"])
def _finish(
    y, bias, pixels,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, P)[None, :]
    ok = (n < pixels) & (c < C)
    at = y + n * C + c
    value = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    value += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    value = activate(value, ACTIVATION, EXACT)
    tl.store(at, value.to(y.dtype.element_ty), mask=ok)


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


def finish(y: Tensor, bias: Tensor, activation: str | None) -> None:
    """Add the bias to each pixel of `y`, (B, C, H, W) in the channels-last format, and activate."""
    if y.numel():
        launch(_finish, plan(y.shape, y.dtype, y.device, activation).finish, y, bias)


def sum_columns(y: Tensor) -> Tensor:
    """The sum over the pixels of `y`, (B, C, H, W) in the channels-last format: (C,), float32."""
    if not y.numel():
        return torch.zeros(y.shape[1], dtype=torch.float32, device=y.device)
    how = plan(y.shape, y.dtype, y.device)
    parts = torch.empty(how.parts, dtype=torch.float32, device=y.device)
    launch(_sum_columns, how.sum_columns, y, parts)
    return parts.sum(0)
