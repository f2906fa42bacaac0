"""The registration of `scaled_add`; Triton is imported at the first launch."""

import torch

from ..runtime.operator import Operator
from ..runtime.program import cache_launches


@cache_launches
def _run(x, branch, scale, keep):
    from .forward import forward

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    forward(x.contiguous(), branch.contiguous(), scale, keep, out)
    return out


def _save(ctx, inputs, output):
    _, branch, scale, keep = inputs
    ctx.branch_dtype = branch.dtype
    ctx.save_for_backward(None if scale is None else branch, scale, keep)


def _differentiate(ctx, grad):
    return grad, *run_backward(grad, *ctx.saved_tensors, ctx.branch_dtype), None


@cache_launches
def run_backward(grad, branch, scale, keep, branch_dtype):
    """The gradients of branch and scale; without a scale the branch is not needed."""
    from .backward import backward

    dbranch = torch.empty(grad.shape, dtype=branch_dtype, device=grad.device)
    dscale = backward(grad.contiguous(), branch, scale, keep, dbranch)
    if scale is None or dscale is None:
        return dbranch, None
    return dbranch, dscale.to(scale.dtype)


scaled_add = Operator("scaled_add", _run, _save, _differentiate)
