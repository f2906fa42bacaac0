"""The Triton kernel of `column_sum`, which both of its stages run.

The first sums a run of rows per program to a row of float32, the second those rows. The order is
fixed by the shape and the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from .plan import plan


# Of the channels it matters whether 16 bytes of a row can be loaded at once.
@triton.jit(do_not_specialize=["count", "per"])
def _sum_columns(
    rows, sums, count, per, channels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sums over `per` rows of a block of columns."""
    row = tl.arange(0, ROWS)[:, None]
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    live = c < channels
    first = tl.program_id(1).to(tl.int64) * per
    last = tl.minimum(first + per, count)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        n = start + row
        ok = (n < last) & live[None, :]
        total += tl.load(rows + n * channels + c[None, :], mask=ok, other=0.0).to(tl.float32)
    at = sums + tl.program_id(1).to(tl.int64) * channels + c
    tl.store(at, tl.sum(total, 0).to(sums.dtype.element_ty), mask=live)


def sum_columns(x: Tensor, out: Tensor) -> None:
    """Write the sum of the rows of `x`, (N, C) and contiguous, to `out`."""
    how = plan(x.shape, x.device)
    parts = torch.empty(how.parts, dtype=torch.float32, device=x.device)
    launch(_sum_columns, how.sum_rows, x, parts)
    launch(_sum_columns, how.sum_parts, parts, out)
