"""Depthwise convolution of a channels-last map, with its activation, bias and residual."""

import torch
from torch import Tensor

from ..runtime.activation import Activation, check_activation
from ..runtime.dispatch import runs_triton
from . import operator, reference

# The sides of a window that the kernels take.
TRITON_KERNELS = (3, 5, 7, 9)


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
        weight: (C, 1, k, k), k odd, in the dtype of `x` or, under autocast, any. On CUDA a k of
            3, 5, 7 or 9 runs the Triton kernel, any other the reference.
        bias: (C,) or None.
        stride: 1 or 2; the output has ceil(H / stride) rows.
        activation: a, applied to the input first: 'gelu' (exact, erf), 'relu' or None.
        residual: add a(x) to the result; needs stride 1.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), C), in the dtype of `x` or, under autocast, in
        the one that PyTorch's own operators would give; sums are in float32.

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
    check_activation(activation)
    if residual and stride != 1:
        raise ValueError(f"residual needs stride 1, got stride {stride}")
    dtype = _result_dtype(x, weight, bias, residual)
    if kernel not in TRITON_KERNELS or not runs_triton(x):
        return reference.depthwise_conv2d(x, weight, bias, stride, activation, residual)
    return operator.depthwise_conv2d(x, weight, bias, stride, activation, residual, dtype)


def _result_dtype(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> torch.dtype:
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        return torch.promote_types(x.dtype, dtype) if residual else dtype
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.dtype != x.dtype:
            raise ValueError(
                f"{name} is {parameter.dtype}, but x is {x.dtype}: cast one of them, or run "
                "under torch.autocast"
            )
    return x.dtype
