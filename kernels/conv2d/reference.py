"""The reference of `conv2d`, in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from ..runtime.activation import Activation, activate
from ..runtime.dispatch import channels_last


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
    activation: Activation | None,
) -> Tensor:
    """The convolution and its activation by PyTorch; see the public function."""
    y = F.conv2d(channels_last(x), weight, bias, stride, padding, dilation, groups)
    return activate(channels_last(y), activation)
