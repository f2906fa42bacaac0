"""Focal losses (Lin et al., 2017, equation 5), of sigmoid and of softmax, with their gradients.

`target` (N,) holds classes in [0, C). For the sigmoid any other value (mmdet: C is background)
says that a row belongs to no class; for the softmax that it is ignored. `weight` is (C,), a
factor for the rows of each class (1 for rows of none), or empty.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.dispatch import runs_triton
from ..runtime.operator import Operator
from .autograd import accumulator


def _row_factors(weight: Tensor, target: Tensor, classes: int) -> Tensor:
    if not weight.numel():
        return weight.new_ones(())
    known = (target >= 0) & (target < classes)
    return torch.where(known, weight[target.clamp(0, classes - 1)], 1.0)


def _hits(x: Tensor, target: Tensor) -> Tensor:
    return target[:, None] == torch.arange(x.shape[1], device=x.device)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Into `output` (N, C), with p = sigmoid(input).

    -alpha (1 - p)^gamma log p where the class is the target, -(1 - alpha) p^gamma log(1 - p)
    elsewhere.
    """
    if runs_triton(input):
        _sigmoid_focal_loss(input, target, weight, output, gamma, alpha, False)
        return
    x, hit = input.to(accumulator(input)), _hits(input, target)
    # With x's sign turned where the class is not the target, the two cases are one.
    x = torch.where(hit, x, -x)
    loss = -torch.sigmoid(-x).pow(gamma) * F.logsigmoid(x)
    loss = loss * torch.where(hit, alpha, 1 - alpha)
    if weight.numel():
        loss = loss * _row_factors(weight, target, x.shape[1])[:, None]
    output.copy_(loss)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """The derivative of `sigmoid_focal_loss_forward` in `input`, into `grad_input` (N, C)."""
    if runs_triton(input):
        _sigmoid_focal_loss(input, target, weight, grad_input, gamma, alpha, True)
        return
    x, hit = input.to(accumulator(input)), _hits(input, target)
    sign = torch.where(hit, 1.0, -1.0).to(x.dtype)
    x = sign * x
    p, rest = torch.sigmoid(x), torch.sigmoid(-x)
    slope = rest.pow(gamma) * (gamma * p * F.logsigmoid(x) - rest)
    slope = slope * sign * torch.where(hit, alpha, 1 - alpha)
    if weight.numel():
        slope = slope * _row_factors(weight, target, x.shape[1])[:, None]
    grad_input.copy_(slope)


def _target_probability(softmax: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row the probability of its target, and whether it has one."""
    classes = softmax.shape[1]
    known = (target >= 0) & (target < classes)
    p = softmax.gather(1, target.clamp(0, classes - 1)[:, None])[:, 0]
    return p.to(accumulator(softmax)), known


def softmax_focal_loss_forward(
    softmax: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Into `output` (N,): -alpha (1 - p)^gamma log p, p the target's entry of `softmax` (N, C)."""
    p, known = _target_probability(softmax, target)
    log = p.clamp(min=torch.finfo(p.dtype).tiny).log()
    loss = -alpha * (1 - p).pow(gamma) * log * _row_factors(weight, target, softmax.shape[1])
    output.copy_(torch.where(known, loss, 0.0))


def softmax_focal_loss_backward(
    softmax: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """The derivative of the loss in the logits, into `grad_input` (N, C).

    `buff` (N,) gets the derivative in log p.
    """
    p, known = _target_probability(softmax, target)
    tiny = torch.finfo(p.dtype).tiny
    log = p.clamp(min=tiny).log()
    # At p = 1 and a gamma below 1 the first power would be infinite, times log p = 0.
    focus = gamma * (1 - p).clamp(min=tiny).pow(gamma - 1) * p * log
    slope = alpha * (focus - (1 - p).pow(gamma)) * _row_factors(weight, target, softmax.shape[1])
    slope = torch.where(known, slope, 0.0)
    buff.copy_(slope)
    hit = _hits(softmax, target).to(slope.dtype)
    grad_input.copy_(slope[:, None] * (hit - softmax))


# The Triton side. Triton itself is imported at the first launch, not before.


def _run(input, target, weight, output, gamma, alpha, gradient):
    from .focal_loss_triton import sigmoid_focal_loss

    out = output.contiguous()
    sigmoid_focal_loss(input.contiguous(), target.contiguous(), weight, out, gamma, alpha, gradient)
    if out is not output:
        output.copy_(out)


def _run_fake(input, target, weight, output, gamma, alpha, gradient):
    return None


_sigmoid_focal_loss = Operator(
    "sigmoid_focal_loss",
    _run,
    schema="(Tensor input, Tensor target, Tensor weight, Tensor(a!) output, float gamma, "
    "float alpha, bool gradient) -> ()",
    fake=_run_fake,
)
