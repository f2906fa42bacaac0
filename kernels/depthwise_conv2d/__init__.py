"""Depthwise convolution of a channels-last map, with its activations, bias and residual."""

import torch
from torch import Tensor

from ..runtime.activation import Activation, activate, check_activation
from ..runtime.dispatch import check_vectors, runs_triton
from ..scaled_add import scaled_add
from ..scaled_add.reference import scaled_add as add_reference
from . import operator, reference

# The sides of a square window, and the most pixels of a row or column, that the kernels take.
TRITON_KERNELS = (3, 5, 7, 9)
LONGEST_STRIP = 11


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    dilation: int = 1,
    activation: Activation | None = None,
    residual: bool = False,
    result_activation: Activation | None = None,
    branch: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Depthwise convolution that pads with zeros: r(conv(a(x)) + bias), plus a(x) if `residual`.

    With a residual branch s = x + scale * branch stands for x throughout. Where no gradient is
    recorded, the kernel adds the two where it loads them, and applies r where it stores; a gradient
    needs s and what r is applied to, so there they are tensors of their own.

    Args:
        x: (B, H, W, C), any strides with the last axis contiguous.
        weight: (C, 1, h, w), h and w odd, in the dtype of `x` or, under autocast, any; or
            (B, C, h, w), a window for each image, which needs stride and dilation 1 and no bias
            (InLine, arXiv:2412.06590, section 4.2). On CUDA a square of side 3, 5, 7 or 9, and a
            row or column of up to 11 pixels, run the Triton kernel, any other the reference.
        bias: (C,) or None.
        stride: 1 or 2; the output has ceil(H / stride) rows.
        dilation: distance of the pixels under the window, 1 or more; the padding is
            dilation * (h // 2) rows and dilation * (w // 2) columns. Other than 1 it needs
            stride 1.
        activation: a, applied to the input first: 'gelu' (exact, erf), 'relu' or None.
        residual: add a(x) to the convolution; needs stride 1.
        result_activation: r, applied to the result, the residual included: as `activation`.
        branch: of the shape of `x`, of any floating dtype, or None; needs stride 1.
        scale: (C,), a layer scale (arXiv:2103.17239) of the branch, or None for 1.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), C), in the dtype of `x` or, under autocast, in
        the one that PyTorch's own operators would give; sums are in float32.

    Raises:
        ValueError: if shapes disagree or an option is out of range.
    """
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, H, W, C)")
    channels = x.shape[3]
    # In this order, as to compare an open batch with the channels would tie an export to its own.
    if weight.ndim != 4 or weight.shape[1] != 1 or weight.shape[0] != channels:
        _check_own_windows(x, weight, bias, stride, dilation)
    height, width = weight.shape[2:]
    if height % 2 == 0 or width % 2 == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected odd h and w")
    if stride not in (1, 2):
        raise ValueError(f"stride is {stride}, expected 1 or 2")
    if dilation < 1 or (dilation != 1 and stride != 1):
        raise ValueError(
            f"dilation is {dilation} at stride {stride}, expected 1, or 2 or more at stride 1"
        )
    check_activation(activation)
    if result_activation is not None:
        check_activation(result_activation, "result_activation")
    if residual and stride != 1:
        raise ValueError(f"residual needs stride 1, got stride {stride}")
    if branch is not None and (stride != 1 or branch.shape != x.shape):
        raise ValueError(
            f"branch has shape {tuple(branch.shape)} at stride {stride}, expected "
            f"{tuple(x.shape)} at stride 1"
        )
    check_vectors(channels, scale=scale)
    dtype = _result_dtype(x, weight, bias, residual)
    is_strip = min(height, width) == 1 and max(height, width) <= LONGEST_STRIP
    is_square = height == width and height in TRITON_KERNELS
    by_kernel = (is_strip or is_square) and runs_triton(x)
    more = branch is not None or result_activation is not None
    if more and by_kernel and not _needs_gradient(x, branch, scale, weight, bias):
        return operator.fused_depthwise_conv2d(
            x, branch, scale, weight, bias, stride, dilation, activation, residual,
            result_activation, dtype,
        )  # fmt: skip
    if branch is not None:
        x = add_reference(x, branch, None) if scale is None else scaled_add(x, branch, scale)
    options = (stride, dilation, activation, residual)
    if by_kernel:
        y = operator.depthwise_conv2d(x, weight, bias, *options, dtype)
    else:
        y = reference.depthwise_conv2d(x, weight, bias, *options)
    return y if result_activation is None else activate(y, result_activation)


def _check_own_windows(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, dilation: int
) -> None:
    batch, channels = x.shape[0], x.shape[3]
    if weight.ndim != 4 or weight.shape[:2] != (batch, channels):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected ({channels}, 1, h, w), or "
            f"({batch}, {channels}, h, w) for a window of each image"
        )
    if stride != 1 or dilation != 1 or bias is not None:
        got = f"stride {stride} and dilation {dilation}" if bias is None else "a bias"
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, a window for each image, which needs "
            f"stride and dilation 1 and no bias, got {got}"
        )


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


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
