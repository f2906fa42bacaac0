"""The Triton kernel of `apply_rotary`; turning back, it is its own gradient."""

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from .plan import plan


@triton.jit(do_not_specialize=["count", "tokens", "heads", "width", "row_stride", "column_stride"])
def _turn(
    x, rows, columns, out, x_b, x_n, x_h, o_b, o_n, o_h,
    count, tokens, heads, width, row_stride, column_stride,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    quarter: tl.constexpr = D // 4
    vector = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = vector < count
    token = vector // heads
    b = token // tokens
    n = (token - b * tokens).to(tl.int32)
    row = n // width
    i = tl.arange(0, P // 2)[None, :]
    angle = tl.where(
        i < quarter,
        rows + row[:, None] * quarter + i,
        columns + (n - row * width)[:, None] * quarter + (i - quarter),
    )
    sine = tl.where(i < quarter, row_stride, column_stride)
    ok = valid[:, None] & (i < 2 * quarter)
    cosine = tl.load(angle, mask=ok, other=0.0)
    sine = tl.load(angle + sine, mask=ok, other=0.0)
    if BACK:
        sine = -sine
    d = tl.arange(0, P)[None, :]
    ok = valid[:, None] & (d < D)
    head = vector - token * heads
    at = x + b * x_b + n * x_n + head * x_h
    value = tl.load(at[:, None] + d, mask=ok, other=0.0).to(tl.float32)
    first, second = tl.split(tl.reshape(value, (BLOCK, P // 2, 2)))
    value = tl.join(first * cosine - second * sine, second * cosine + first * sine)
    value = tl.reshape(value, (BLOCK, P)).to(out.dtype.element_ty)
    at = out + b * o_b + n * o_n + head * o_h
    tl.store(at[:, None] + d, value, mask=ok)


def forward(x: Tensor, rows: Tensor, columns: Tensor, back: bool, out: Tensor) -> None:
    """Write `x`, turned or turned back, to `out`, which may be `x`."""
    how = plan(x.shape, columns.shape, rows.shape, back)
    launch(_turn, how.forward, x, rows, columns, out, *x.stride()[:3], *out.stride()[:3])
