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


@triton.jit(do_not_specialize=["count", "image"])
def _backward(
    grad, branch, scale, keep, dbranch, parts, count, image,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    SCALE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """dbranch and, with a scale, this program's part (C,) of the scale's gradient."""
    row = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, P)[None, :]
    live = c < C
    if SCALE:
        factor = tl.load(scale + c, mask=live, other=0.0).to(tl.float32)
        dscale = tl.zeros((ROWS, P), tl.float32)
    tiles = tl.cdiv(count, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        n = tile * ROWS + row
        ok = (n < count) & live
        at = n.to(tl.int64) * C + c
        dy = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
        if KEEP:
            dy *= tl.load(keep + n // image, mask=n < count, other=0.0).to(tl.float32)
        if SCALE:
            dscale += dy * tl.load(branch + at, mask=ok, other=0.0).to(tl.float32)
            dy *= factor
        tl.store(dbranch + at, dy.to(dbranch.dtype.element_ty), mask=ok)
    if SCALE:
        c = tl.arange(0, P)
        at = parts + tl.program_id(0).to(tl.int64) * C + c
        tl.store(at, tl.sum(dscale, 0), mask=c < C)


def backward(
    grad: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    keep: Tensor | None,
    dbranch: Tensor,
) -> Tensor | None:
    """Write the gradient of the branch; return that of the scale, (C,) in float32.

    Without a scale the branch is None, and so is the result.
    """
    how = plan(grad.shape, grad.device, scale is not None, keep is not None)
    keep = grad if keep is None else keep.contiguous()
    if branch is None or scale is None:
        launch(_backward, how.backward, grad, grad, grad, keep, dbranch, grad)
        return None
    parts = torch.empty(how.parts, dtype=torch.float32, device=grad.device)
    tensors = branch.contiguous(), scale.contiguous(), keep, dbranch, parts
    launch(_backward, how.backward, grad, *tensors)
    return parts.sum(0)
