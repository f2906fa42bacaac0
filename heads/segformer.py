"""SegFormer's all-MLP head (Xie et al., arXiv:2105.15203)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from .decode_head import ConvModule, DecodeHead, resize


@MODELS.register_module()
class SegformerHead(DecodeHead):
    """Each map through a linear layer, brought to the finest one's size, and fused linearly.

    Args:
        channels: of every map in the head.
        **kwargs: see :class:`DecodeHead`.
    """

    def __init__(self, *args: Any, channels: int = 256, **kwargs: Any) -> None:
        super().__init__(*args, channels=channels, **kwargs)
        self.convs = nn.ModuleList(ConvModule(width, channels) for width in self.in_channels)
        self.fusion_conv = ConvModule(len(self.in_channels) * channels, channels)

    def decode(self, maps: list[Tensor]) -> Tensor:
        # Fusing and resizing are linear, so their order is free: each map's share of the fusion
        # is computed at the map's own size, and nothing is concatenated at the finest.
        weights = self.fusion_conv.conv.weight.split(self.channels, 1)
        parts = [
            F.conv2d(conv(x), weight)
            for conv, weight, x in zip(self.convs, weights, maps, strict=True)
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total + resize(part, total.shape[2:])
        return self.fusion_conv.finish(total)
