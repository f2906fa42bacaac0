"""The reference of `batch_norm`, in plain PyTorch."""

from typing import TYPE_CHECKING

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..runtime.activation import Activation, activate
from ..runtime.compilation import is_collecting
from ..runtime.dispatch import without_autocast

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def normalize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None,
    addend: Tensor | None,
    eps: float,
    activation: Activation | None,
) -> Tensor:
    """The norm with the running statistics; see `batch_norm`."""
    norm = F.batch_norm(x, running_mean, running_var, weight, bias, False, eps=eps)
    return _add(activate(norm, activation), x, residual, addend)


def _add(norm: Tensor, x: Tensor, residual: Tensor | None, addend: Tensor | None) -> Tensor:
    """norm + residual * x + addend, rounded once."""
    if residual is None and addend is None:
        return norm
    wide = torch.promote_types(x.dtype, torch.float32)
    total = norm.to(wide)
    if residual is not None:
        total = torch.addcmul(total, x.to(wide), residual.to(wide)[:, None, None])
    return (total if addend is None else total + addend).to(x.dtype)


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None,
    addend: Tensor | None,
    momentum: float,
    eps: float,
    activation: Activation | None,
    process_group: "ProcessGroup | None",
) -> Tensor:
    """The norm with the statistics of the batch; see the public function."""
    if process_group is None:
        norm = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
        return _add(activate(norm, activation), x, residual, addend)
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x):
        values = x.to(wide)
        mean, variance, count = _GroupStatistics.apply(values, process_group)
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            unbiased = variance * (count / (count - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        mean, factor, weight, bias = (
            t.to(wide)[:, None, None] for t in (mean, (variance + eps).rsqrt(), weight, bias)
        )
        norm = ((values - mean) * factor * weight + bias).to(x.dtype)
    return _add(activate(norm, activation), x, residual, addend)


def gather_parts(part: Tensor, process_group: "ProcessGroup") -> Tensor:
    """The tensors of one shape that all processes of a group hold, stacked: (processes, ...)."""
    if is_collecting():  # The other processes are not there to answer.
        return torch.stack([part] * process_group.size())
    parts = [torch.empty_like(part) for _ in range(process_group.size())]
    distributed.all_gather(parts, part, group=process_group)
    return torch.stack(parts)


class _GroupStatistics(torch.autograd.Function):
    """Mean, biased variance and count (C,) of each channel over the processes of a group.

    Each process has a mean, a sum of squares about it, and a count; Chan, Golub and LeVeque's
    formula merges them. A process's loss depends on the values of all: the gradients of mean and
    variance are summed over the processes first.
    """

    @staticmethod
    def forward(ctx, x: Tensor, process_group: "ProcessGroup") -> tuple[Tensor, Tensor, Tensor]:
        size = x.shape[0] * x.shape[2] * x.shape[3]
        mean = x.sum((0, 2, 3)) / max(size, 1)
        squares = (x - mean[:, None, None]).square().sum((0, 2, 3))
        part = torch.stack((mean, squares, torch.full_like(mean, size)))
        means, squares, counts = gather_parts(part, process_group).unbind(1)
        count = counts.sum(0)
        mean = (means * counts).sum(0) / count
        variance = (squares + (means - mean).square() * counts).sum(0) / count
        ctx.save_for_backward(x, mean, count)
        ctx.process_group = process_group
        ctx.mark_non_differentiable(count)
        return mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx, dmean: Tensor, dvariance: Tensor, _: Tensor) -> tuple[Tensor, None]:
        x, mean, count = ctx.saved_tensors
        gradients = torch.stack((dmean, dvariance))
        distributed.all_reduce(gradients, group=ctx.process_group)
        dmean, dvariance = (gradients / count)[:, :, None, None]
        return dmean + 2 * dvariance * (x - mean[:, None, None]), None
