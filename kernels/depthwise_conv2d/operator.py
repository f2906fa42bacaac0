"""The registration of `depthwise_conv2d`; Triton is imported at the first launch."""

import torch
from torch import Tensor

from ..runtime.dispatch import rows_contiguous
from ..runtime.operator import Operator
from ..runtime.program import cache_launches


def _run(x, weight, bias, stride, dilation, activation, residual, dtype):
    return _run_fused(
        x, None, None, weight, bias, stride, dilation, activation, residual, None, dtype
    )


@cache_launches
def _run_fused(
    x, branch, scale, weight, bias, stride, dilation, activation, residual, result_activation, dtype
):
    from .convolution import forward

    x, branch, scale, bias = map(rows_contiguous, (x, branch, scale, bias))
    out = _empty_result(x, stride, dtype)
    window, image, addend, result = _along_rows(weight.contiguous(), x, branch, out)
    forward(
        image, window, bias, stride, activation, residual, result,
        dilation, addend, scale, result_activation,
    )  # fmt: skip
    return out


def _along_rows(weight: Tensor, *maps: Tensor | None) -> tuple:
    """A weight and maps (B, H, W, C), all turned where a column is the window: it becomes a row.

    A row needs no unfinished sums, and one machine code serves both.
    """
    if weight.shape[2] <= weight.shape[3]:
        return weight, *maps
    return weight.transpose(2, 3), *(None if x is None else x.transpose(1, 2) for x in maps)


def _run_fused_fake(
    x, branch, scale, weight, bias, stride, dilation, activation, residual, result_activation, dtype
):
    return _empty_result(x, stride, dtype)


def _run_fake(x, weight, bias, stride, dilation, activation, residual, dtype):
    return _empty_result(x, stride, dtype)


def _empty_result(x: Tensor, stride: int, dtype: torch.dtype) -> Tensor:
    batch, height, width, channels = x.shape
    shape = (batch, -(-height // stride), -(-width // stride), channels)
    return x.new_empty(shape, dtype=dtype)


@cache_launches
def _run_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    dilation: int,
    activation: str | None,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from .convolution import input_gradient
    from .weight_gradient import weight_gradient

    x, grad = rows_contiguous(x), rows_contiguous(grad)
    dx, dweight, dbias = gradients = empty_gradients(x, weight)
    window, grad, x, dx = _along_rows(weight.contiguous(), grad, x, dx)
    input_gradient(grad, x, window, stride, activation, residual, dx, dilation=dilation)
    weight_gradient(grad, x, stride, activation, dweight.view(window.shape), dbias, dilation)
    return gradients


def empty_gradients(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """New tensors for the gradients of x, and, in the dtype of the weight, of weight and bias.

    With a window for each image the kernels leave there, per image, what would be the bias's.
    """
    windows = weight.shape[:1] if weight.shape[1] == 1 else (weight.shape[0] * weight.shape[1],)
    shapes = ((x, x.shape), (weight, weight.shape), (weight, windows))
    dx, dweight, dbias = (torch.empty(shape, dtype=t.dtype, device=t.device) for t, shape in shapes)
    return dx, dweight, dbias


def _run_backward_fake(grad, x, weight, stride, dilation, activation, residual):
    return empty_gradients(x, weight)


def _save(ctx, inputs, output):
    x, weight, bias, *ctx.options, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx, grad):
    dx, dweight, dbias = _backward(grad, *ctx.saved_tensors, *ctx.options)
    dbias = None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)
    return dx, dweight, dbias, None, None, None, None, None


def count_flops(shape, weight) -> int:
    """The products of a convolution with a result of one shape (B, H, W, C)."""
    batch, height, width, channels = shape
    return 2 * batch * height * width * channels * weight[2] * weight[3]


def _count_forward(x, weight, *_, out_shape, **__) -> int:
    return count_flops(out_shape, weight)


def _count_fused(x, branch, scale, weight, *_, out_shape, **__) -> int:
    return count_flops(out_shape, weight)


def _count_backward(grad, x, weight, *_, **__) -> int:
    return 2 * count_flops(grad, weight)


depthwise_conv2d = Operator(
    "depthwise_conv2d",
    _run,
    _save,
    _differentiate,
    schema="(Tensor x, Tensor weight, Tensor? bias, int stride, int dilation, "
    "str? activation, bool residual, ScalarType dtype) -> Tensor",
    fake=_run_fake,
    flops=_count_forward,
)
# Without a gradient: where one is recorded, it needs the sum before the convolution and what the
# result is the activation of, which are made, and kept, on their own.
fused_depthwise_conv2d = Operator(
    "fused_depthwise_conv2d",
    _run_fused,
    schema="(Tensor x, Tensor? branch, Tensor? scale, Tensor weight, Tensor? bias, int stride, "
    "int dilation, str? activation, bool residual, str? result_activation, ScalarType dtype) "
    "-> Tensor",
    fake=_run_fused_fake,
    flops=_count_fused,
)
_backward = Operator(
    "depthwise_conv2d_backward",
    _run_backward,
    schema="(Tensor grad, Tensor x, Tensor weight, int stride, int dilation, str? activation, "
    "bool residual) -> (Tensor, Tensor, Tensor)",
    fake=_run_backward_fake,
    flops=_count_backward,
)
