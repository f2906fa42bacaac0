"""The Triton kernel of the gradient of `scaled_add`.

The scale's gradient is summed in a fixed order, in two stages, of which the second is PyTorch's:
it costs the host less than another launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from .plan import plan


@triton.jit(do_not_specialize=["count"])
def _backward(
    grad, branch, scale, dbranch, parts, count,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dbranch, and this program's part (C,) of the gradient of the scale."""
    row = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, P)[None, :]
    live = c < C
    factor = tl.load(scale + c, mask=live, other=0.0).to(tl.float32)
    dscale = tl.zeros((ROWS, P), tl.float32)
    tiles = tl.cdiv(count, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        n = tile * ROWS + row
        ok = (n < count) & live
        at = n.to(tl.int64) * C + c
        dy = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
        dscale += dy * tl.load(branch + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(dbranch + at, (dy * factor).to(dbranch.dtype.element_ty), mask=ok)
    c = tl.arange(0, P)
    at = parts + tl.program_id(0).to(tl.int64) * C + c
    tl.store(at, tl.sum(dscale, 0), mask=c < C)


def backward(grad: Tensor, branch: Tensor, scale: Tensor, dbranch: Tensor) -> Tensor:
    """Write the gradient of `branch`; return that of the scale, (C,) in float32."""
    how = plan(grad.shape, grad.device)
    parts = torch.empty(how.parts, dtype=torch.float32, device=grad.device)
    launch(_backward, how.backward, grad, branch, scale, dbranch, parts)
    return parts.sum(0)
