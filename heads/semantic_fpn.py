"""Semantic FPN (Kirillov et al., Panoptic Feature Pyramid Networks, arXiv:1901.02446)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from mmengine.model import BaseModule, xavier_init
from mmengine.registry import MODELS
from torch import Tensor, nn

from .decode_head import ConvModule, DecodeHead, resize


@MODELS.register_module()
class FPN(BaseModule):
    """Feature pyramid: each map gets the coarser ones added (arXiv:1612.03144).

    Args:
        in_channels: of the maps, finest first.
        out_channels: of every output.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int = 256) -> None:
        super().__init__()
        self.out_channels = [out_channels] * len(in_channels)
        self.lateral_convs = nn.ModuleList(
            ConvModule(channels, out_channels, norm=False, act=False) for channels in in_channels
        )
        self.fpn_convs = nn.ModuleList(
            ConvModule(out_channels, out_channels, 3, norm=False, act=False) for _ in in_channels
        )
        for module in (*self.lateral_convs, *self.fpn_convs):
            xavier_init(module.conv, distribution="uniform")

    def init_weights(self) -> None:
        """Nothing: the weights were initialised when they were created."""

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, out_channels, H_i, W_i) of maps (B, C_i, H_i, W_i)."""
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(
                laterals[i], size=laterals[i - 1].shape[2:], mode="nearest"
            )
        return [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=True)]


@MODELS.register_module()
class FPNHead(DecodeHead):
    """Semantic FPN's head: each map is convolved and doubled up to the finest, then all added.

    Args:
        feature_strides: of the maps, finest first, each a power of two times the first.
        channels: of the sum.
        **kwargs: see :class:`DecodeHead`.
    """

    def __init__(
        self, *args: Any, feature_strides: Sequence[int], channels: int = 128, **kwargs: Any
    ) -> None:
        super().__init__(*args, channels=channels, **kwargs)
        if len(feature_strides) != len(self.in_channels):
            raise ValueError(
                f"feature_strides are {tuple(feature_strides)}, for {len(self.in_channels)} maps"
            )
        doublings = [math.log2(stride / feature_strides[0]) for stride in feature_strides]
        if any(steps < 0 or steps != int(steps) for steps in doublings):
            raise ValueError(
                f"feature_strides are {tuple(feature_strides)}: each must be a power of two "
                "times the first, the finest"
            )
        self.scale_heads = nn.ModuleList(
            _scale_head(channels_in, channels, int(steps))
            for channels_in, steps in zip(self.in_channels, doublings, strict=True)
        )

    def decode(self, maps: list[Tensor]) -> Tensor:
        total = self.scale_heads[0](maps[0])
        for head, x in zip(self.scale_heads[1:], maps[1:], strict=True):
            total = total + resize(head(x), total.shape[2:])
        return total


def _scale_head(in_channels: int, channels: int, doublings: int) -> nn.Sequential:
    if not doublings:
        return nn.Sequential(ConvModule(in_channels, channels, 3))
    layers: list[nn.Module] = []
    for step in range(doublings):
        layers.append(ConvModule(channels if step else in_channels, channels, 3))
        layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return nn.Sequential(*layers)
