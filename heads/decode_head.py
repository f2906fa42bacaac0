"""What the heads of semantic segmentation share, named as OpenMMLab's mmsegmentation names it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule, constant_init, kaiming_init
from torch import Tensor, nn

from ..backbones.layers import BatchNormAct2d, Conv2d, fuse_conv_norm

MOST_ELEMENTS = 2**30


class ConvModule(nn.Module):
    """Convolution, batch normalisation, ReLU: ``conv`` without a bias, ``bn``.

    Args:
        in_channels, out_channels: of the convolution.
        kernel_size: odd; the map keeps its size.
        norm: whether there is a batch norm; without it the convolution has a bias instead.
        act: whether there is a ReLU.
        conv_layer: makes the convolution, with the arguments of ``torch.nn.Conv2d``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        norm: bool = True,
        act: bool = True,
        conv_layer: Callable[..., nn.Module] = Conv2d,
    ) -> None:
        super().__init__()
        self.conv = conv_layer(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=not norm
        )
        self.activation = "relu" if act else None
        self.bn = BatchNormAct2d(out_channels, activation=self.activation) if norm else None
        kaiming_init(self.conv, nonlinearity="relu")
        if norm:
            constant_init(self.bn, 1)

    def forward(self, *maps: Tensor) -> Tensor:
        """(B, out_channels, H, W) of the maps that the convolution takes."""
        x = self.conv(*maps)
        if self.bn is not None:
            x = self.bn(x)
        # The ReLU is in the batch norm's layer, but not in one that has taken its place.
        done = self.activation is None or isinstance(self.bn, BatchNormAct2d)
        return x if done else F.relu(x)

    def fuse(self) -> nn.Module:
        """This module, its batch norm and ReLU in the convolution, as evaluation computes them."""
        if type(self.conv) is Conv2d and type(self.bn) is BatchNormAct2d:
            self.conv = fuse_conv_norm(self.conv, self.bn)
            self.bn = self.activation = None
        return self


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
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.get_parameter("bias"))

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
    exporting = torch.compiler.is_exporting()  # a graph for any size cannot ask for it
    if not exporting and x.shape[2:] == tuple(size):
        return x
    interpolate = partial(F.interpolate, size=tuple(size), mode="bilinear", align_corners=False)
    if exporting:
        return interpolate(x)
    # 150 classes of 4096 x 4096 pixels are more than PyTorch's kernels count: some at a time.
    step = max(1, MOST_ELEMENTS // (len(x) * math.prod(size)))
    if step >= x.shape[1]:
        return interpolate(x)
    result = x.new_empty(*x.shape[:2], *size)
    for start in range(0, x.shape[1], step):
        some = slice(start, start + step)
        result[:, some] = interpolate(x[:, some].contiguous())
    return result
