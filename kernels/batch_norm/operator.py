"""The registration of `batch_norm`; Triton is imported at the first launch."""

import torch
import torch.distributed as distributed
from torch.autograd.graph import increment_version

from ..runtime.compilation import is_collecting
from ..runtime.dispatch import channels_last, rows_contiguous
from ..runtime.operator import Operator
from ..runtime.program import cache_launches
from .reference import gather_parts


@cache_launches
def normalize(x, weight, bias, running_mean, running_var, eps, activation):
    """The norm of a channels-last map with the running statistics; records no gradient."""
    from .forward import normalize_running

    out = torch.empty_like(x)
    mean, variance, weight, bias = (
        t.contiguous() for t in (running_mean, running_var, weight, bias)
    )
    normalize_running(x, mean, variance, weight, bias, eps, activation, out)
    return out


def _run(
    x, weight, bias, running_mean, running_var, residual, addend,
    momentum, eps, activation, process_group,
):  # fmt: skip
    parts = None if process_group is None else gather_parts(_run_gather(x), process_group)
    results = _run_merge(
        x, parts, weight, bias, running_mean, running_var, residual, addend,
        momentum, eps, activation,
    )  # fmt: skip
    increment_version((running_mean, running_var))
    return results


@cache_launches
def _run_gather(x):
    """The statistics of this process, as one part."""
    from .forward import gather, reduce

    return reduce(gather(x))


@cache_launches
def _run_merge(
    x, parts, weight, bias, running_mean, running_var, residual, addend, momentum, eps, activation
):
    """The norm, and the statistics of all processes' parts, or of x alone without parts."""
    from .forward import gather, merge, normalize

    parts = gather(x) if parts is None else parts
    mean, variance = map(rows_contiguous, (running_mean, running_var))
    statistics = merge(parts, mean, variance, momentum, eps)
    for running, moved in ((running_mean, mean), (running_var, variance)):
        if moved is not running:
            running.copy_(moved)
    out = torch.empty_like(x)
    weight, bias, residual = map(rows_contiguous, (weight, bias, residual))
    normalize(x, statistics, weight, bias, residual, addend, activation, out)
    return out, statistics


def _save(ctx, inputs, output):
    x, weight, bias, _, _, residual, addend, *_, ctx.activation, ctx.process_group = inputs
    ctx.save_for_backward(x, weight, bias, residual, output[1])
    ctx.has_addend = addend is not None
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * 11
    x, weight, bias, residual, statistics = ctx.saved_tensors
    grad = channels_last(grad)
    daddend = grad if ctx.has_addend else None
    if ctx.process_group is None:
        *gradients, dresidual = _run_backward(
            grad, x, statistics, weight, bias, residual, None, ctx.activation
        )
        return *gradients, None, None, dresidual, daddend, *(None,) * 4
    # The gradients of weight and bias stay those of this process: distributed training reduces
    # them like all others.
    sums = _run_sums(grad, x, statistics, weight, bias, ctx.activation)
    dweight, dbias = sums[1].to(weight.dtype), sums[0].to(bias.dtype)
    dresidual = _differentiate_residual(residual, sums, statistics)
    total = sums.clone()
    if not is_collecting():  # The other processes are not there to answer.
        distributed.all_reduce(total, group=ctx.process_group)
    dx, *_ = _run_backward(grad, x, statistics, weight, bias, residual, total, ctx.activation)
    return dx, dweight, dbias, None, None, dresidual, daddend, *(None,) * 4


def _differentiate_residual(residual, sums, statistics):
    """The sum of the gradient times x, from its sums and those of its product with the norm."""
    if residual is None:
        return None
    return (sums[1] / statistics[1] + sums[0] * statistics[0]).to(residual.dtype)


@cache_launches
def _run_sums(grad, x, statistics, weight, bias, activation):
    """The gradients of bias and weight, (2, C), from the values of this process."""
    from .backward import gradient_sums

    weight, bias = rows_contiguous(weight), rows_contiguous(bias)
    return gradient_sums(grad, x, statistics, weight, bias, activation)


@cache_launches
def _run_backward(grad, x, statistics, weight, bias, residual, sums, activation):
    """The gradients of x, weight, bias and residual, by the sums of all processes, or of this one
    alone."""
    from .backward import gradient_sums, input_gradient

    dx = torch.empty_like(x)
    weight, bias, factor = map(rows_contiguous, (weight, bias, residual))
    if sums is None:
        sums = gradient_sums(grad, x, statistics, weight, bias, activation)
    input_gradient(grad, x, statistics, weight, bias, factor, sums, activation, dx)
    dresidual = _differentiate_residual(residual, sums, statistics)
    return dx, sums[1].to(weight.dtype), sums[0].to(bias.dtype), dresidual


batch_norm = Operator("batch_norm", _run, _save, _differentiate)
