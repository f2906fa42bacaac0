"""The reference of `depthwise_conv2d`, in plain PyTorch."""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.activation import Activation, activate


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    activation: Activation | None = None,
    residual: bool = False,
) -> Tensor:
    """The convolution by PyTorch; see the public function."""
    x = activate(x, activation)
    image = x.permute(0, 3, 1, 2)
    if has_own_windows(x, weight):
        y = convolve_each(image, weight)
    else:
        y = F.conv2d(
            image, weight, bias, stride, padding=weight.shape[-1] // 2, groups=weight.shape[0]
        )
    y = y.permute(0, 2, 3, 1)
    if not residual:
        return y
    # In place, because the first use of fresh memory costs more than the sum.
    return y.add_(x) if y.dtype == x.dtype else x + y


def has_own_windows(x: Tensor, weight: Tensor) -> bool:
    """Whether a weight has a window for each image of x (B, H, W, C), not one for all."""
    return weight.shape[1] != 1 or weight.shape[0] != x.shape[3]


def convolve_each(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve each image of x (B, C, H, W) with its own windows (B, C, k, k)."""
    batch, channels, height, width = x.shape
    size = weight.shape[-1]
    # The number of groups would specialise an exported graph to this batch size, and no images
    # would make no groups, which PyTorch refuses.
    if torch.compiler.is_exporting() or batch == 0:
        x = F.pad(x, (size // 2,) * 4)
        return reduce(
            torch.add,
            (
                x[:, :, i : i + height, j : j + width] * weight[:, :, i, j, None, None]
                for i in range(size)
                for j in range(size)
            ),
        )
    y = F.conv2d(
        x.reshape(1, batch * channels, height, width),
        weight.reshape(batch * channels, 1, size, size),
        padding=size // 2,
        groups=batch * channels,
    )
    return y.view(batch, channels, height, width)
