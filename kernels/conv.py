"""Convolutions of images, and the bias and activation of any, in one pass over their map.

An image has too few channels for the tensor cores' layout, and PyTorch takes it by a direct
convolution, after a copy to the channels-last format and another to half precision: five times as
long as its bytes take. Here a kernel gathers each pixel's patch from the image as it is. Of other
maps PyTorch's own convolution computes the products; to them it adds the bias element by element, a
pass that takes longer than some of the products, and an activation is another: in inference they
are one, in place. A compiler sees `reference`, and fuses as it likes.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import eager_function, plain, runs_triton, stream_dtype

Activation = Literal["gelu", "relu"]

# Of what the kernel that gathers patches takes.
MOST_CHANNELS, LARGEST_KERNEL = 4, 7


def check_activation(activation: str | None) -> None:
    """Raise ValueError unless it is an `Activation` or none."""
    if activation not in (None, *get_args(Activation)):
        raise ValueError(f"activation is {activation!r}, expected None, 'gelu' or 'relu'")


def activated(x: Tensor, activation: Activation | None) -> Tensor:
    """a(x), by PyTorch."""
    return x if activation is None else getattr(F, activation)(x)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    activation: Activation | None,
) -> Tensor:
    """See `conv2d`."""
    y = channels_last(F.conv2d(channels_last(x), weight, bias, stride, padding))
    return activated(y, activation)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    activation: Activation | None = None,
) -> Tensor:
    """a(conv(x) + bias), for a result in the channels-last memory format.

    Args:
        x: (B, I, H, W), of any floating dtype and strides. Up to 4 channels under a kernel of up to
            7 x 7 are read as they lie, in whatever dtype; their gradient, if asked for, is
            PyTorch's.
        weight: (O, I, h, w).
        bias: (O,), or none.
        stride, padding: as of `torch.nn.functional.conv2d`.
        activation: a, 'gelu' (exact, erf), 'relu' or none.

    Returns:
        (B, O, H', W'), in the dtype of `x`, or autocast's; sums are in float32 or wider.

    Raises:
        ValueError: for another activation.
        RuntimeError: by PyTorch, if shapes or dtypes disagree.
    """
    check_activation(activation)
    stride, padding = (v if isinstance(v, tuple) else (v, v) for v in (stride, padding))
    if runs_triton(x) and plain((x, weight, bias)):
        recorded = torch.is_grad_enabled()
        dtype = _image_dtype(x, weight, bias, stride, padding)
        if dtype is not None:
            now = None if recorded else activation
            y = _of_image(x, weight, bias, stride, padding, now, dtype)
            return activated(y, activation) if recorded else y
        if not recorded and bias is not None:
            return _finished(x, weight, bias, stride, padding, activation)
    return reference(x, weight, bias, stride, padding, activation)


def _image_dtype(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> torch.dtype | None:
    """The dtype of the result, if it is that of an image through the kernel for one."""
    if x.ndim != 4 or x.shape[1] > MOST_CHANNELS or max(weight.shape[2:]) > LARGEST_KERNEL:
        return None
    fits = weight.shape[1] == x.shape[1] and (bias is None or bias.shape == weight.shape[:1])
    if x.requires_grad or not fits or min(_result_shape(x, weight, stride, padding)) < 1:
        return None
    agree = all(t is None or t.dtype == x.dtype for t in (weight, bias))
    return stream_dtype(x) if agree or torch.is_autocast_enabled(x.device.type) else None


def _result_shape(
    x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> tuple[int, int, int, int]:
    """(B, H', W', O)."""
    height, width = (
        (x.shape[2 + i] + 2 * padding[i] - weight.shape[2 + i]) // stride[i] + 1 for i in range(2)
    )
    return x.shape[0], height, width, weight.shape[0]


# The Triton side. Triton itself is imported at the first launch, not before.


def _finished(x, weight, bias, stride, padding, activation):
    from . import conv_triton as kernels

    y = channels_last(F.conv2d(channels_last(x), weight, None, stride, padding))
    kernels.finish(y, bias.contiguous(), activation)
    return y


def _run(x, weight, bias, stride, padding, activation, dtype):
    from . import conv_triton as kernels

    shape = _result_shape(x, weight, stride, padding)
    out = torch.empty(shape, dtype=dtype, device=x.device)
    kernels.convolve_image(x, weight.contiguous(), bias, stride, padding, activation, out)
    return out.permute(0, 3, 1, 2)


def _save(ctx, inputs, output):
    x, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(x)
    ctx.weight = weight.shape, weight.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx, grad):
    from . import conv_triton as kernels

    (x,) = ctx.saved_tensors
    stride, padding, *_ = ctx.options
    shape, dtype = ctx.weight
    grad = grad.permute(0, 2, 3, 1).contiguous()
    dweight, dbias = kernels.image_weight_gradient(grad, x, shape, stride, padding)
    dbias = None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)
    return None, dweight.to(dtype), dbias, None, None, None, None


_of_image = eager_function("image_conv2d", _run, _save, _differentiate)
