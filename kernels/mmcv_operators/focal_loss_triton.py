"""The Triton kernel of the sigmoid focal loss: every logit is read once, and a loss written."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import Launch, cache_plan, cdiv, launch


# Specialised on whether 16 divides the total, without which loads are of one element each.
@triton.jit(do_not_specialize=["gamma", "alpha"])
def _focal(
    x, target, weight, out, total, classes, gamma, alpha,
    GRADIENT: tl.constexpr, WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    ok = at < total
    # One division of 64 bits a program; from its first row on, 32 do.
    first = start // classes
    place = (start - first * classes).to(tl.int32) + tl.arange(0, BLOCK)
    row = place // classes
    label = tl.load(target + first + row, mask=ok, other=0)
    hit = place - row * classes == label
    sign = tl.where(hit, 1.0, -1.0)
    v = sign * tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    tail = tl.log(1.0 + tl.exp(-tl.abs(v)))
    log_p = tl.minimum(v, 0.0) - tail
    # Finite, so that a gamma of 0 takes nothing from an infinite logit.
    log_rest = tl.maximum(tl.minimum(-v, 0.0) - tail, -1e38)
    factor = tl.where(hit, alpha, 1.0 - alpha) * tl.exp(gamma * log_rest)
    if WEIGHT:
        known = ok & (label >= 0) & (label < classes)
        factor *= tl.load(weight + label, mask=known, other=1.0).to(tl.float32)
    if GRADIENT:
        factor *= sign * (gamma * tl.exp(log_p) * log_p - tl.exp(log_rest))
    else:
        factor *= -log_p
    tl.store(out + at, factor.to(out.dtype.element_ty), mask=ok)


@dataclass(frozen=True)
class Plan:
    """The launch of the loss or of its gradient."""

    focal: Launch


@cache_plan
def plan(
    total: int, classes: int, gamma: float, alpha: float, gradient: bool, weight: bool
) -> Plan:
    """Plan for `total` logits."""
    block = 1024
    constants = {"GRADIENT": gradient, "WEIGHT": weight, "BLOCK": block, "num_warps": 4}
    return Plan(Launch((cdiv(total, block),), (total, classes, gamma, alpha), constants))


def sigmoid_focal_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    out: Tensor,
    gamma: float,
    alpha: float,
    gradient: bool,
) -> None:
    """Write the losses of contiguous logits `x` (N, C), or their gradients, to contiguous `out`."""
    how = plan(x.numel(), x.shape[1], gamma, alpha, gradient, weight.numel() > 0)
    launch(_focal, how.focal, x, target, weight, out)
