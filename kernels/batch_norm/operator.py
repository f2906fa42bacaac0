"""The registration of `batch_norm`; Triton is imported at the first launch."""

import torch
import torch.distributed as distributed
from torch.autograd.graph import increment_version

from ..runtime.dispatch import channels_last
from ..runtime.operator import Operator
from .reference import gather_parts


def normalize(x, weight, bias, running_mean, running_var, eps, activation):
    """The norm of a channels-last map with the running statistics; records no gradient."""
    from .forward import normalize_running

    out = torch.empty_like(x)
    mean, variance, weight, bias = (
        t.contiguous() for t in (running_mean, running_var, weight, bias)
    )
    normalize_running(x, mean, variance, weight, bias, eps, activation, out)
    return out


def _run(x, weight, bias, running_mean, running_var, momentum, eps, activation, process_group):
    from .forward import gather, merge, normalize, reduce

    parts = gather(x)
    if process_group is not None:
        parts = gather_parts(reduce(parts), process_group)
    statistics = merge(parts, running_mean, running_var, momentum, eps)
    increment_version((running_mean, running_var))
    out = torch.empty_like(x)
    normalize(x, statistics, weight, bias, activation, out)
    return out, statistics


def _save(ctx, inputs, output):
    x, weight, bias, *_, ctx.activation, ctx.process_group = inputs
    ctx.save_for_backward(x, weight, bias, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    from .backward import gradient_sums, input_gradient

    if grad is None:
        return (None,) * 9
    x, weight, bias, statistics = ctx.saved_tensors
    grad = channels_last(grad)
    dx = torch.empty_like(x)
    sums = gradient_sums(grad, x, statistics, weight, bias, ctx.activation)
    dbias, dweight = sums[0].to(bias.dtype), sums[1].to(weight.dtype)
    if ctx.process_group is not None:
        # The gradients of weight and bias stay those of this process: distributed training reduces
        # them like all others.
        sums = sums.clone()
        distributed.all_reduce(sums, group=ctx.process_group)
    input_gradient(grad, x, statistics, weight, bias, sums, ctx.activation, dx)
    return dx, dweight, dbias, *(None,) * 6


batch_norm = Operator("batch_norm", _run, _save, _differentiate)
