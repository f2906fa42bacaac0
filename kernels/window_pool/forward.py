"""The forward kernel of `window_pool`."""

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from .plan import Share

# Sizes that vary with the image: no kernel is compiled anew for them.
SCALARS = [
    *("height", "width", "down", "across", "extent", "dilation", "window", "heads", "rows"),
    *("pieces_y", "pieces_x"),
]


@triton.jit
def _reflect(place, side, FOLDED: tl.constexpr):
    """The token at a place of the folded strip; FOLDED says that it may be folded twice."""
    period = tl.maximum(2 * side - 2, 1)
    if FOLDED:
        place %= period
    return tl.minimum(place, period - place)


@triton.jit(do_not_specialize=SCALARS)
def _pool(
    x, out, x_b, x_y, x_x,
    height, width, down, across, extent, dilation, window, heads, rows,
    D: tl.constexpr, ROWS: tl.constexpr, RUN: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """ROWS averages of one image."""
    b = tl.program_id(1).to(tl.int64)
    x += b * x_b
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = row // D % heads
    place = row // D // heads
    down_by = (place // window * dilation)[:, None]
    across_by = (place % window * dilation)[:, None]
    squares = down * across
    # Triton 3.6 mixes rows up where a loop adds the sums of its tiles.
    total = tl.zeros((ROWS, RUN), tl.float32)
    for start in range(0, squares, RUN):
        step = start + tl.arange(0, RUN)[None, :]
        entry = (row % D)[:, None] * squares + step
        square = entry // D
        i = _reflect(square // across * extent + down_by, height, FOLDED)
        j = _reflect(square % across * extent + across_by, width, FOLDED)
        at = i.to(tl.int64) * x_y + j.to(tl.int64) * x_x + head[:, None] * D + entry % D
        ok = (row < rows)[:, None] & (step < squares)
        total += tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    average = tl.sum(total, 1) / squares.to(tl.float32)
    tl.store(out + b * rows + row, average.to(out.dtype.element_ty), mask=row < rows)


def forward(how: tuple[Share, ...], x: Tensor, out: Tensor) -> None:
    """Write each share's averages to its part of `out`."""
    for share, y in zip(how, out, strict=True):
        part = x[..., share.channels]
        launch(_pool, share.pool, part, y, *part.stride()[:3])
