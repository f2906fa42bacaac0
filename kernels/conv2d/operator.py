"""The registration of `conv2d`; Triton is imported at the first launch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..column_sum.operator import run_sum
from ..runtime.dispatch import channels_last, rows_contiguous
from ..runtime.operator import Operator
from ..runtime.program import cache_launches


def result_shape(
    x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> tuple[int, int, int, int]:
    """(B, H', W', O) of a convolution that is not dilated."""
    height, width = (
        (x.shape[2 + i] + 2 * padding[i] - weight.shape[2 + i]) // stride[i] + 1 for i in range(2)
    )
    return x.shape[0], height, width, weight.shape[0]


def convolve(x, weight, bias, stride, padding, dilation, groups, activation):
    """PyTorch's products, then bias and activation in one pass; records no gradient."""
    y = F.conv2d(channels_last(x), weight, None, stride, padding, dilation, groups)
    return _run_finish(channels_last(y), bias, activation)


@cache_launches
def _run_finish(y, bias, activation):
    """`y`, to which the bias is added in place, activated."""
    from .finish import finish

    finish(y, bias.contiguous(), activation)
    return y


def _run_with_bias(x, weight, bias, stride, padding, dilation, groups):
    return convolve(x, weight, bias, stride, padding, dilation, groups, None)


def _save_with_bias(ctx, inputs, output):
    x, weight, bias, *ctx.geometry = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = bias.dtype


def _differentiate_with_bias(ctx, grad):
    x, weight = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.geometry
    grad = channels_last(grad)
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        grad, channels_last(x), weight, None, stride, padding, dilation, False, (0, 0), groups,
        (*ctx.needs_input_grad[:2], False),
    )  # fmt: skip
    dbias = None
    if ctx.needs_input_grad[2]:
        dbias = run_sum(grad.permute(0, 2, 3, 1).flatten(0, 2), ctx.bias_dtype)
    return dx, dweight, dbias, None, None, None, None


@cache_launches
def _run_image(x, weight, bias, stride, padding, activation, dtype):
    from .image import convolve_image

    out = torch.empty(result_shape(x, weight, stride, padding), dtype=dtype, device=x.device)
    weight, bias = weight.contiguous(), rows_contiguous(bias)
    convolve_image(x, weight, bias, stride, padding, activation, out)
    return out.permute(0, 3, 1, 2)


def _save_image(ctx, inputs, output):
    x, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(x)
    ctx.weight = weight.shape, weight.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate_image(ctx, grad):
    (x,) = ctx.saved_tensors
    stride, padding, *_ = ctx.options
    gradients = _run_image_backward(grad, x, *ctx.weight, ctx.bias_dtype, stride, padding)
    return None, *gradients, None, None, None, None


@cache_launches
def _run_image_backward(grad, x, shape, dtype, bias_dtype, stride, padding):
    from .image import image_weight_gradient

    grad = grad.permute(0, 2, 3, 1).contiguous()
    dweight, dbias = image_weight_gradient(grad, x, shape, stride, padding)
    return dweight.to(dtype), None if bias_dtype is None else dbias.to(bias_dtype)


convolve_with_bias = Operator(
    "conv2d_with_bias", _run_with_bias, _save_with_bias, _differentiate_with_bias
)
convolve_image = Operator("image_conv2d", _run_image, _save_image, _differentiate_image)
