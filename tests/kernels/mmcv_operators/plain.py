"""What the operators' tests share: autograd around a pair of operators, and points in a map."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def differentiable(run: Callable, differentiate: Callable) -> Callable[..., Tensor]:
    """A function of tensors with gradients, as mmcv makes one of a forward and a backward.

    `run(*tensors)` gives the output, `differentiate(slope, *tensors)` the tensors' gradients.
    """

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return run(*tensors)

        @staticmethod
        def backward(ctx, slope):
            return differentiate(slope, *ctx.saved_tensors)

    return Operator.apply


def pixel(plane: Tensor, row: int, column: int) -> Tensor | float:
    """A pixel of a map (H, W), zero outside."""
    inside = 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]
    return plane[row, column] if inside else 0.0


def bilinear(plane: Tensor, y: float, x: float) -> Tensor | float:
    """The value of a map (H, W) at (y, x), the map continued by zeros."""
    top, left = math.floor(y), math.floor(x)
    dy, dx = y - top, x - left
    return (
        (1 - dy) * (1 - dx) * pixel(plane, top, left)
        + (1 - dy) * dx * pixel(plane, top, left + 1)
        + dy * (1 - dx) * pixel(plane, top + 1, left)
        + dy * dx * pixel(plane, top + 1, left + 1)
    )
