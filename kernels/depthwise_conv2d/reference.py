"""The reference of `depthwise_conv2d`, in plain PyTorch."""

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
    y = F.conv2d(
        x.permute(0, 3, 1, 2),
        weight,
        bias,
        stride=stride,
        padding=weight.shape[-1] // 2,
        groups=weight.shape[0],
    ).permute(0, 2, 3, 1)
    if not residual:
        return y
    # In place, because the first use of fresh memory costs more than the sum.
    return y.add_(x) if y.dtype == x.dtype else x + y
