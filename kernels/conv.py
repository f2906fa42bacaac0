"""Convolutions whose bias and activation are one pass over their map, in place, in eager inference.

PyTorch's own convolution computes the products. To them it adds the bias element by element, a
pass that takes longer than some of the products, and an activation is another. A compiler sees
`reference`, and fuses as it likes.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import plain, runs_triton

Activation = Literal["gelu", "relu"]


def activated(x: Tensor, activation: Activation | None) -> Tensor:
    """a(x), by PyTorch."""
    return x if activation is None else getattr(F, activation)(x)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    activation: Activation | None,
) -> Tensor:
    """See `conv2d`."""
    return activated(F.conv2d(x, weight, bias, stride, padding), activation)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    activation: Activation | None = None,
) -> Tensor:
    """a(conv(x) + bias), the last two in one pass where no gradient is recorded.

    Args:
        x: (B, I, H, W), of any floating dtype; in the channels-last memory format the result is,
            too.
        weight: (O, I, k, k).
        bias: (O,).
        stride, padding: as of `torch.nn.functional.conv2d`.
        activation: a, 'gelu' (exact, erf), 'relu' or none.

    Returns:
        (B, O, H', W'), in the dtype of `x`, or autocast's.

    Raises:
        ValueError: for another activation.
        RuntimeError: by PyTorch, if shapes disagree.
    """
    if activation not in (None, "gelu", "relu"):
        raise ValueError(f"activation is {activation!r}, expected None, 'gelu' or 'relu'")
    if torch.is_grad_enabled() or not runs_triton(x) or not plain((x, weight, bias)):
        return reference(x, weight, bias, stride, padding, activation)
    y = F.conv2d(x, weight, None, stride, padding)
    if not y.is_contiguous(memory_format=torch.channels_last):
        return activated(y.add_(bias[:, None, None]), activation)
    from . import conv_triton as kernels

    kernels.finish(y, bias.contiguous(), activation)
    return y
