"""What the Triton kernels of `landmark_kernel` and `gaussian_attention` share."""

import triton
import triton.language as tl

from ..runtime.mathematics import PRECISION, exponential, multiply


@triton.jit
def half_square(x):
    """|x|^2 / 2 of each row."""
    x = x.to(tl.float32)
    return 0.5 * tl.sum(x * x, 1)


@triton.jit
def rows_of(x, start, last, stride, D: tl.constexpr, P: tl.constexpr, COUNT: tl.constexpr):
    """Rows start .. start + COUNT - 1 of x, zero from `last` on and beyond column D."""
    n = start + tl.arange(0, COUNT)
    d = tl.arange(0, P)
    mask = (n < last)[:, None] & (d < D)[None, :]
    return tl.load(x + n.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def landmark_tile(x_i, x_j, i, j):
    """One tile of the landmarks' own kernel."""
    if x_i.dtype == tl.float32:
        score = tl.dot(x_i, tl.trans(x_j), input_precision=PRECISION)
    else:
        score = multiply(x_i, tl.trans(x_j))
    score -= half_square(x_i)[:, None] + half_square(x_j)[None, :]
    # The distance of a landmark from itself is zero but for rounding.
    return tl.where(i[:, None] == j[None, :], 1.0, exponential(score, True))
