"""The registration of `scaled_add`; Triton is imported at the first launch."""

import torch

from ..runtime.operator import Operator
from ..runtime.program import cache_launches


@cache_launches
def _run(x, branch, scale):
    from .forward import forward

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    forward(x.contiguous(), branch.contiguous(), scale.contiguous(), out)
    return out


def _save(ctx, inputs, output):
    _, branch, scale = inputs
    ctx.save_for_backward(branch, scale)


def _differentiate(ctx, grad):
    return grad, *run_backward(grad, *ctx.saved_tensors)


@cache_launches
def run_backward(grad, branch, scale):
    """The gradients of branch and scale."""
    from .backward import backward

    dbranch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    dscale = backward(grad.contiguous(), branch.contiguous(), scale.contiguous(), dbranch)
    return dbranch, dscale.to(scale.dtype)


scaled_add = Operator("scaled_add", _run, _save, _differentiate)
