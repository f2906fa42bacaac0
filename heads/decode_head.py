"""What the heads of semantic segmentation share, named as OpenMMLab's mmsegmentation names it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from mmengine.model import BaseModule, constant_init, kaiming_init, normal_init
from torch import Tensor, nn

from ..backbones.layers import normalized, normalized_conv2d
from ..kernels.conv2d import conv2d

MOST_ELEMENTS = 2**30


class ConvModule(nn.Module):
    """Convolution, batch normalisation, ReLU: ``conv`` without a bias, ``bn``.

    The batch norm is in the convolution in evaluation mode, and takes the ReLU in in training.

    Args:
        in_channels, out_channels: of the convolution.
        kernel_size: odd; the map keeps its size.
        norm: without it the convolution has a bias instead.
        act: without it the result is linear.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        norm: bool = True,
        act: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=not norm
        )
        self.bn = nn.BatchNorm2d(out_channels) if norm else None
        self.activation = "relu" if act else None
        kaiming_init(self.conv, nonlinearity="relu")
        if norm:
            constant_init(self.bn, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.bn is None:
            conv = self.conv
            return conv2d(
                x, conv.weight, conv.bias, padding=conv.padding, activation=self.activation
            )
        return normalized_conv2d(x, self.conv, self.bn, self.activation)

    def finish(self, x: Tensor) -> Tensor:
        """Batch norm and activation of what ``conv`` gave."""
        return normalized(x, self.bn, self.activation)


class DecodeHead(BaseModule):
    """Maps (B, C_i, H_i, W_i) to logits (B, num_classes, H_0, W_0) through ``conv_seg``.

    Args:
        in_channels: of the maps that the head reads.
        num_classes: how many classes.
        channels: of the map before ``conv_seg``.
        in_index: which of the maps it reads; by default all.
        dropout_ratio: the share of channels dropped before ``conv_seg``.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int,
        in_index: Sequence[int] | None = None,
        dropout_ratio: float = 0.1,
    ) -> None:
        super().__init__()
        self.in_index = tuple(range(len(in_channels)) if in_index is None else in_index)
        if not all(0 <= index < len(in_channels) for index in self.in_index):
            raise ValueError(
                f"in_index is {self.in_index}, but there are maps 0 to {len(in_channels) - 1}"
            )
        self.in_channels = [in_channels[index] for index in self.in_index]
        self.num_classes = num_classes
        self.channels = channels
        self.dropout = nn.Dropout2d(dropout_ratio)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        normal_init(self.conv_seg, std=0.01)

    def init_weights(self) -> None:
        """Nothing: the weights were initialised when they were created."""

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits (B, num_classes, H, W) at the size of the finest map that the head reads."""
        return self.conv_seg(self.dropout(self.decode([maps[i] for i in self.in_index])))

    def decode(self, maps: list[Tensor]) -> Tensor:
        """The map (B, channels, H, W) to classify, from the maps that the head reads."""
        raise NotImplementedError


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, corners not aligned, of (B, C, H, W) to (H', W'), in the dtype of `x`."""
    if x.shape[2:] == tuple(size):
        return x
    # 150 classes of 4096 x 4096 pixels are more than PyTorch's kernels count: some at a time.
    step = max(1, MOST_ELEMENTS // (len(x) * math.prod(size)))
    interpolate = partial(F.interpolate, size=tuple(size), mode="bilinear", align_corners=False)
    if step >= x.shape[1]:
        return interpolate(x)
    result = x.new_empty(*x.shape[:2], *size)
    for start in range(0, x.shape[1], step):
        some = slice(start, start + step)
        result[:, some] = interpolate(x[:, some].contiguous())
    return result
