"""How the table's backward operators differentiate their forward, and in which dtype."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..runtime.dispatch import without_autocast


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], slope: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of ``(function(*inputs) * slope).sum()`` in `inputs`, by running it anew."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad(), without_autocast(slope):
        result = function(*leaves)
        return torch.autograd.grad(result, leaves, slope.to(result.dtype), materialize_grads=True)


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype in which sums over `x` are taken: float32, or its own where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)
