"""The registration of `scaled_add`; Triton is imported at the first launch."""

import torch

from ..runtime.operator import Operator


def _run(x, branch, scale):
    from .forward import forward

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    forward(x.contiguous(), branch.contiguous(), scale.contiguous(), out)
    return out


def _save(ctx, inputs, output):
    _, branch, scale = inputs
    ctx.save_for_backward(branch, scale)


def _differentiate(ctx, grad):
    from .backward import backward

    branch, scale = ctx.saved_tensors
    dbranch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    dscale = backward(grad.contiguous(), branch.contiguous(), scale.contiguous(), dbranch)
    return grad, dbranch, dscale.to(scale.dtype)


scaled_add = Operator("scaled_add", _run, _save, _differentiate)
