"""The Triton kernel of `scaled_add`."""

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from .plan import plan


@triton.jit(do_not_specialize=["count"])
def _forward(
    x, branch, scale, out, count, C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, P)[None, :]
    ok = (n < count) & (c < C)
    at = n * C + c
    factor = tl.load(scale + c, mask=c < C, other=0.0).to(tl.float32)
    total = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    total += factor * tl.load(branch + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=ok)


def forward(x: Tensor, branch: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write x + scale * branch to `out`; all tensors are contiguous."""
    launch(_forward, plan(x.shape, x.device).forward, x, branch, scale, out)
