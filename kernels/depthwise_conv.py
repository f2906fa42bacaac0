"""Depthwise convolution of a channels-last map, with its activation, bias and residual."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Operator, rows_contiguous, runs_triton

Activation = Literal["gelu"]

TRITON_KERNELS = (3, 5, 7, 9)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    activation: Activation | None,
    residual: bool,
    branch: Tensor | None = None,
) -> Tensor:
    """The convolution through PyTorch's own; see `depthwise_conv2d`."""
    if branch is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        x = (x.to(wide) + branch.to(wide)).to(x.dtype)
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
    branch: Tensor | None = None,
) -> Tensor:
    """Depthwise convolution with zero padding k // 2: conv(a(x)) + bias, plus a(x) if `residual`.

    With a `branch` x + branch stands for x throughout; the kernel adds the two where it loads
    them, and writes their sum only if a gradient will ask for it.

    Args:
        x: (B, H, W, C), any strides with the last axis contiguous.
        weight: (C, 1, k, k), k odd, in the dtype of `x` or, under autocast, any. On CUDA a k of
            3, 5, 7 or 9 runs the Triton kernel, any other the reference.
        bias: (C,) or none.
        stride: 1 or 2; the output has ceil(H / stride) rows.
        activation: a, applied to the input first: 'gelu' (exact, erf) or none.
        residual: add a(x) to the result; needs stride 1.
        branch: of the shape of `x`, of any floating dtype, or none; the sum is rounded to the
            dtype of `x`. Needs stride 1.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), C), in the dtype of `x` or, under autocast, in the
        one that PyTorch's own operators would give; sums are in float32.

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
    if branch is not None and (stride != 1 or branch.shape != x.shape):
        raise ValueError(
            f"branch has shape {tuple(branch.shape)} at stride {stride}, expected "
            f"{tuple(x.shape)} at stride 1"
        )
    dtype = _result_dtype(x, weight, bias, residual)
    if kernel not in TRITON_KERNELS or not runs_triton(x):
        return reference(x, weight, bias, stride, activation, residual, branch)
    gelu = activation == "gelu"
    keep = (
        branch is not None
        and torch.is_grad_enabled()
        and any(t.requires_grad for t in (x, branch, weight))
    )
    return _forward(x, branch, weight, bias, stride, gelu, residual, keep, dtype)[0]


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


# The Triton side. Triton itself is imported at the first launch, not before.


def _run(x, branch, weight, bias, stride, gelu, residual, keep, dtype):
    from . import depthwise_conv_triton as kernels

    x, branch = rows_contiguous(x), rows_contiguous(branch)
    out, total = _run_fake(x, branch, weight, bias, stride, gelu, residual, keep, dtype)
    kept = total if keep else None
    kernels.forward(x, weight.contiguous(), bias, stride, gelu, residual, out, branch, kept)
    return out, total


def _run_fake(x, branch, weight, bias, stride, gelu, residual, keep, dtype):
    batch, height, width, channels = x.shape
    shape = (batch, -(-height // stride), -(-width // stride), channels)
    # An operator returns a fixed number of tensors: an empty one stands for none.
    return x.new_empty(shape, dtype=dtype), x.new_empty(x.shape if keep else (0,))


def _run_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, gelu: bool, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from . import depthwise_conv_triton as kernels

    x = rows_contiguous(x)
    grad = rows_contiguous(grad)
    dx, dweight, dbias = empty_gradients(x, weight)
    kernels.input_gradient(grad, x, weight.contiguous(), stride, gelu, residual, dx)
    kernels.weight_gradient(grad, x, stride, gelu, dweight, dbias)
    return dx, dweight, dbias


def empty_gradients(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, and in the dtype of the weight of weight and bias."""
    shapes = ((x, x.shape), (weight, weight.shape), (weight, weight.shape[:1]))
    return tuple(torch.empty(shape, dtype=t.dtype, device=t.device) for t, shape in shapes)


def _run_backward_fake(grad, x, weight, stride, gelu, residual):
    return empty_gradients(x, weight)


def _save(ctx, inputs, output):
    x, branch, weight, bias, *ctx.options, keep, _ = inputs
    ctx.save_for_backward(output[1] if keep else x, weight)
    ctx.branch_dtype, ctx.bias_dtype = (None if t is None else t.dtype for t in (branch, bias))
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * 9
    dx, dweight, dbias = _backward(grad, *ctx.saved_tensors, *ctx.options)
    dbranch = None if ctx.branch_dtype is None else dx.to(ctx.branch_dtype)
    dbias = None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)
    return dx, dbranch, dweight, dbias, None, None, None, None, None


_forward = Operator(
    "depthwise_conv2d(Tensor x, Tensor? branch, Tensor weight, Tensor? bias, int stride, "
    "bool gelu, bool residual, bool keep, ScalarType dtype) -> (Tensor, Tensor)",
    _run,
    _run_fake,
    _save,
    _differentiate,
)
_backward = Operator(
    "depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, int stride, bool gelu, "
    "bool residual) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _run_backward_fake,
)
