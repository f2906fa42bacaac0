"""What the Triton kernels share: the hardware's own functions, and sums of partial results."""

import os

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
PTX = tl.constexpr(torch.version.cuda is not None and not INTERPRETED.value)


@triton.jit
def exp2_approximate(x):
    """2^x to two roundings of float32, zero below 2^-126, at one instruction."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1
        )
    else:
        return tl.exp2(x)


@triton.jit
def reciprocal_approximate(x):
    """1 / x to one rounding of float32, at one instruction."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1
        )
    else:
        return 1.0 / x


@triton.jit
def sum_rows(parts, count, stride, column, live, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum over `count` rows, `stride` floats apart, of `column`, in a fixed order."""
    row = tl.arange(0, ROWS)[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, ROWS):
        at = parts + (start + row).to(tl.int64) * stride + column[None, :]
        total += tl.load(at, mask=(start + row < count) & live[None, :], other=0.0)
    return tl.sum(total, 0)
