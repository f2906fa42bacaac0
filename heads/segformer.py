"""SegFormer's all-MLP head (Xie et al., arXiv:2105.15203)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from .decode_head import ConvModule, DecodeHead, resize


class FusionConv2d(nn.Conv2d):
    """A 1 x 1 convolution of maps that are brought to the first one's size and concatenated.

    Convolving and resizing are linear, so that their order is free: each map's share is computed
    at its own size, and nothing is concatenated at the finest.
    """

    def forward(self, *maps: Tensor) -> Tensor:
        """(B, out_channels, H_0, W_0) of maps (B, C_i, H_i, W_i), finest first."""
        weights = self.weight.split([x.shape[1] for x in maps], 1)
        parts = [F.conv2d(x, weight) for x, weight in zip(maps, weights, strict=True)]
        total = parts[0] if self.bias is None else parts[0] + self.bias[:, None, None]
        for part in parts[1:]:
            total = total + resize(part, total.shape[2:])
        return total


@MODELS.register_module()
class SegformerHead(DecodeHead):
    """Each map through a linear layer, brought to the finest one's size, and fused linearly.

    As in SegFormer's own code no norm and no activation follow the linear layers, which
    mmsegmentation's head of this name has.

    Args:
        channels: of every map in the head; SegFormer-B2 to -B5 have 768.
        **kwargs: see :class:`DecodeHead`.
    """

    def __init__(self, *args: Any, channels: int = 256, **kwargs: Any) -> None:
        super().__init__(*args, channels=channels, **kwargs)
        self.convs = nn.ModuleList(
            ConvModule(width, channels, norm=False, act=False) for width in self.in_channels
        )
        self.fusion_conv = ConvModule(
            len(self.in_channels) * channels, channels, conv_layer=FusionConv2d
        )

    def decode(self, maps: list[Tensor]) -> Tensor:
        return self.fusion_conv(*(conv(x) for conv, x in zip(self.convs, maps, strict=True)))
