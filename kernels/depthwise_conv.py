"""Depthwise convolution of a channels-last map, with its activation, bias and residual."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Activation = Literal["gelu"]


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    activation: Activation | None,
    residual: bool,
) -> Tensor:
    """The convolution through PyTorch's own; see `depthwise_conv2d`."""
    if activation == "gelu":
        x = F.gelu(x)
    y = F.conv2d(
        x.permute(0, 3, 1, 2),
        weight,
        bias,
        stride=stride,
        padding=weight.shape[-1] // 2,
        groups=weight.shape[0],
    ).permute(0, 2, 3, 1)
    return x + y if residual else y


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    activation: Activation | None = None,
    residual: bool = False,
) -> Tensor:
    """Depthwise convolution with zero padding k // 2: conv(a(x)) + bias, plus a(x) if `residual`.

    Args:
        x: (B, H, W, C), any strides with the last axis contiguous.
        weight: (C, 1, k, k), k odd.
        bias: (C,) or none.
        stride: 1 or 2; the output has ceil(H / stride) rows.
        activation: a, applied to the input first: 'gelu' (exact, erf) or none.
        residual: add a(x) to the result; needs stride 1.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), C), in the dtype of `x`; sums are in float32.

    Raises:
        ValueError: if shapes disagree or an option is out of range.
    """
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, H, W, C)")
    channels, kernel = x.shape[3], weight.shape[-1]
    if weight.shape != (channels, 1, kernel, kernel) or kernel % 2 == 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected ({channels}, 1, k, k) with odd k"
        )
    if stride not in (1, 2):
        raise ValueError(f"stride is {stride}, expected 1 or 2")
    if activation not in (None, "gelu"):
        raise ValueError(f"activation is {activation!r}, expected None or 'gelu'")
    if residual and stride != 1:
        raise ValueError(f"residual needs stride 1, got stride {stride}")
    return reference(x, weight, bias, stride, activation, residual)
