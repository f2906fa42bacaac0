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
    dilation: int = 1,
    activation: Activation | None = None,
    residual: bool = False,
) -> Tensor:
    """The convolution by PyTorch; see the public function."""
    x = activate(x, activation)
    image = x.permute(0, 3, 1, 2)
    # A graph of a map's phases would be one of its size alone.
    by_phases = dilation > 1 and x.device.type == "cpu" and not torch.compiler.is_exporting()
    if has_own_windows(x, weight):
        y = convolve_each(image, weight)
    elif by_phases:
        y = convolve_phases(image, weight, bias, dilation)
    else:
        padding = tuple(dilation * (side // 2) for side in weight.shape[2:])
        y = F.conv2d(image, weight, bias, stride, padding, dilation, groups=weight.shape[0])
    y = y.permute(0, 2, 3, 1)
    if not residual:
        return y
    # In place, because the first use of fresh memory costs more than the sum.
    return y.add_(x) if y.dtype == x.dtype else x + y


def has_own_windows(x: Tensor, weight: Tensor) -> bool:
    """Whether a weight has a window for each image of x (B, H, W, C), not one for all."""
    return weight.shape[1] != 1 or weight.shape[0] != x.shape[3]


def convolve_phases(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Convolve each phase of x (B, C, H, W), every `dilation`-th pixel of such rows, as an image.

    With windows without gaps PyTorch takes a fifth of the time on a CPU.
    """
    height, width = x.shape[2:]
    x = F.pad(x, (0, -width % dilation, 0, -height % dilation)).permute(0, 2, 3, 1)
    x = x.unflatten(2, (-1, dilation)).unflatten(1, (-1, dilation)).permute(0, 2, 4, 5, 1, 3)
    phases = x.flatten(0, 2)
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    y = F.conv2d(phases, weight, bias, padding=padding, groups=weight.shape[0])
    y = y.unflatten(0, (-1, dilation, dilation)).permute(0, 3, 4, 1, 5, 2)
    return y.flatten(4, 5).flatten(2, 3)[:, :, :height, :width]


def convolve_each(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve each image of x (B, C, H, W) with its own windows (B, C, h, w)."""
    batch, channels, height, width = x.shape
    high, wide = weight.shape[2:]
    # The number of groups would specialise an exported graph to this batch size, and no images
    # would make no groups, which PyTorch refuses.
    if torch.compiler.is_exporting() or batch == 0:
        x = F.pad(x, (wide // 2, wide // 2, high // 2, high // 2))
        return reduce(
            torch.add,
            (
                x[:, :, i : i + height, j : j + width] * weight[:, :, i, j, None, None]
                for i in range(high)
                for j in range(wide)
            ),
        )
    y = F.conv2d(
        x.reshape(1, batch * channels, height, width),
        weight.reshape(batch * channels, 1, high, wide),
        padding=(high // 2, wide // 2),
        groups=batch * channels,
    )
    return y.view(batch, channels, height, width)
