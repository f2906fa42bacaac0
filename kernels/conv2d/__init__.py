"""Convolutions of images, and the bias and activation of any convolution, in one pass.

An image has too few channels for the layout of the tensor cores, and PyTorch takes it by a direct
convolution, after a copy to the channels-last format and another to half precision: five times as
long as its bytes take. Here a kernel gathers each pixel's patch from the image as it is. For other
maps PyTorch's own convolution computes the products; it adds the bias element by element, a pass
that takes longer than some of the products, and an activation is another: here both are one pass,
in place, in inference, and the bias alone in training. A compiler sees the reference, and fuses as
it likes.
"""

import torch
from torch import Tensor

from ..runtime.activation import Activation, activate, check_activation
from ..runtime.dispatch import is_direct_call, runs_triton, stream_dtype
from . import operator, reference

# The most channels, and the largest side of a window, that the kernel for images takes.
MOST_CHANNELS, LARGEST_KERNEL = 4, 7


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: Activation | None = None,
) -> Tensor:
    """a(conv(x) + bias), with a result in the channels-last memory format.

    Args:
        x: (B, I, H, W), of any floating dtype and strides. Up to 4 channels under a window of up
            to 7 x 7, neither dilated nor grouped, are read where they lie, in whatever dtype;
            their gradient, if asked for, is PyTorch's.
        weight: (O, I / groups, h, w).
        bias: (O,), or None.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`.
        activation: a, 'gelu' (exact, erf), 'relu' or None.

    Returns:
        (B, O, H', W'), in the dtype of `x`, or autocast's; sums are in float32 or wider.

    Raises:
        ValueError: for another activation.
        RuntimeError: by PyTorch, if shapes or dtypes disagree.
    """
    check_activation(activation)
    stride, dilation = _pair(stride), _pair(dilation)
    padding = _resolve_padding(padding, weight.shape[2:], stride, dilation)
    geometry = (stride, padding, dilation, groups)
    if isinstance(padding, str):
        return reference.conv2d(x, weight, bias, *geometry, activation)
    usable = runs_triton(x) and _agree(x, weight, bias)
    image = usable and _is_image(x, weight, dilation, groups)
    # Without a bias there are only the products, which PyTorch computes.
    usable = image or (usable and bias is not None)
    if not usable or not is_direct_call((x, weight, bias), "conv2d"):
        return reference.conv2d(x, weight, bias, *geometry, activation)
    if image and min(operator.result_shape(x, weight, stride, padding)) < 1:
        return reference.conv2d(x, weight, bias, *geometry, activation)
    records = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    )
    if image:
        now = None if records else activation
        y = operator.convolve_image(x, weight, bias, stride, padding, now, stream_dtype(x))
        return activate(y, activation) if records else y
    if not records:
        return operator.convolve(x, weight, bias, *geometry, activation)
    if torch.is_autocast_enabled(x.device.type):
        x, weight = (t.to(stream_dtype(x)) for t in (x, weight))
    return activate(operator.convolve_with_bias(x, weight, bias, *geometry), activation)


def _pair(sides: int | tuple[int, int]) -> tuple[int, int]:
    return (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])


def _resolve_padding(
    padding: int | tuple[int, int] | str,
    kernel: torch.Size,
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int] | str:
    """The rows and columns on each side; the word, if the sides differ or it is not allowed."""
    if not isinstance(padding, str):
        return _pair(padding)
    if padding == "valid":
        return (0, 0)
    extra = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if padding == "same" and stride == (1, 1) and not any(e % 2 for e in extra):
        return extra[0] // 2, extra[1] // 2
    return padding


def _agree(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether shapes and dtypes are such as PyTorch takes; if not, it is to raise the error."""
    if x.ndim != 4 or (bias is not None and bias.shape != weight.shape[:1]):
        return False
    agree = all(t is None or t.dtype == x.dtype for t in (weight, bias))
    return agree or torch.is_autocast_enabled(x.device.type)


def _is_image(
    x: Tensor,
    weight: Tensor,
    dilation: tuple[int, int],
    groups: int,
) -> bool:
    """Whether the kernel for images takes a call."""
    if x.shape[1] > MOST_CHANNELS or max(weight.shape[2:]) > LARGEST_KERNEL:
        return False
    return (
        dilation == (1, 1) and groups == 1 and not x.requires_grad and weight.shape[1] == x.shape[1]
    )
