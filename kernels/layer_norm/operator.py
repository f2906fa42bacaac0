"""The registration of `layer_norm`, `rms_norm` and `add_layer_norm`; Triton is imported at first
launch."""

import torch

from ..runtime.dispatch import rows_contiguous
from ..runtime.operator import Operator
from ..runtime.program import cache_launches
from ..scaled_add.operator import run_backward as differentiate_scaled_add


@cache_launches
def _run_norm(x, weight, bias, eps):
    from .forward import forward

    norm = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    forward(x.contiguous(), None, None, None, weight, bias, eps, None, norm)
    return norm


def _save_norm(ctx, inputs, output):
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def _differentiate_norm(ctx, grad):
    return *_run_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None


@cache_launches
def _run_norm_backward(grad, x, weight, bias, eps):
    from .backward import backward

    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad, x = grad.contiguous(), x.contiguous()
    sums = backward(None, grad, x, None, None, None, weight, eps, dx, None)
    return dx, sums[0].to(weight.dtype), sums[1].to(bias.dtype)


def _flatten_rows(x):
    # A view wherever one stride leads from row to row, as in a slice of a packed projection.
    return rows_contiguous(x.reshape(-1, x.shape[-1]))


@cache_launches
def _run_rms_norm(x, weight, eps):
    from .forward import forward

    norm = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    forward(_flatten_rows(x), None, None, None, weight, None, eps, None, norm)
    return norm


def _save_rms_norm(ctx, inputs, output):
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _differentiate_rms_norm(ctx, grad):
    return *_run_rms_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None


@cache_launches
def _run_rms_norm_backward(grad, x, weight, eps):
    from .backward import backward

    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, grad = _flatten_rows(x), grad.contiguous()
    sums = backward(None, grad, x, None, None, None, weight, eps, dx, None, center=False)
    return dx, sums[0].to(weight.dtype)


@cache_launches
def _run(x, branch, scale, keep, weight, bias, eps):
    from .forward import forward

    total, norm = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    forward(x.contiguous(), branch, scale, keep, weight, bias, eps, total, norm)
    return total, norm


def _save(ctx, inputs, output):
    x, branch, scale, keep, weight, bias, ctx.eps = inputs
    ctx.branch_dtype = branch.dtype
    # With a scale its gradient needs the branch; the sum, computed again, is a map less to keep,
    # as x is the sum that the block before keeps.
    maps = (output[0], None) if scale is None else (x, branch)
    ctx.save_for_backward(*maps, scale, keep, weight, bias)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dtotal, dnorm):
    x, branch, scale, keep, weight, bias = ctx.saved_tensors
    if dtotal is None and dnorm is None:
        return (None,) * 7
    if dnorm is None:
        return _differentiate_sum(ctx.branch_dtype, dtotal, branch, scale, keep)
    dx, dbranch, dscale, dweight, dbias = _run_backward(
        dtotal, dnorm, x, branch, scale, keep, weight, bias, ctx.eps, ctx.branch_dtype
    )
    return dx, dbranch, dscale, None, dweight, dbias, None


@cache_launches
def _run_backward(dtotal, dnorm, x, branch, scale, keep, weight, bias, eps, branch_dtype):
    from .backward import backward

    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dbranch = None
    if scale is not None or keep is not None:
        dbranch = torch.empty(x.shape, dtype=branch_dtype, device=x.device)
    dtotal = None if dtotal is None else dtotal.contiguous()
    dnorm, x = dnorm.contiguous(), x.contiguous()
    sums = backward(dtotal, dnorm, x, branch, scale, keep, weight, eps, dx, dbranch)
    if dbranch is None:
        dbranch = dx.to(branch_dtype)
    dscale = None if scale is None else sums[2].to(scale.dtype)
    return dx, dbranch, dscale, sums[0].to(weight.dtype), sums[1].to(bias.dtype)


def _differentiate_sum(dtype, dtotal, branch, scale, keep):
    """The gradients where nothing depends on the norm."""
    if scale is None and keep is None:
        return dtotal, dtotal.to(dtype), *(None,) * 5
    return dtotal, *differentiate_scaled_add(dtotal, branch, scale, keep, dtype), *(None,) * 4


layer_norm = Operator("layer_norm", _run_norm, _save_norm, _differentiate_norm)
rms_norm = Operator("rms_norm", _run_rms_norm, _save_rms_norm, _differentiate_rms_norm)
add_layer_norm = Operator("add_layer_norm", _run, _save, _differentiate)
