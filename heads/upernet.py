"""UPerNet (Xiao et al., Unified Perceptual Parsing, arXiv:1807.10221)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from .decode_head import ConvModule, DecodeHead, resize


@MODELS.register_module()
class UPerHead(DecodeHead):
    """Pyramid pooling on the coarsest map, a feature pyramid below it, all maps fused.

    Args:
        channels: of every map in the head.
        pool_scales: sides of the grids that the coarsest map is averaged to.
        **kwargs: see :class:`DecodeHead`.
    """

    def __init__(
        self,
        *args: Any,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, channels=channels, **kwargs)
        *finer, coarsest = self.in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(coarsest, channels))
            for scale in pool_scales
        )
        self.bottleneck = ConvModule(coarsest + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(width, channels) for width in finer)
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = ConvModule(len(self.in_channels) * channels, channels, 3)

    def decode(self, maps: list[Tensor]) -> Tensor:
        *finer, coarsest = maps
        pooled = [resize(pool(coarsest), coarsest.shape[2:]) for pool in self.psp_modules]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, finer, strict=True)]
        laterals.append(self.bottleneck(torch.cat([coarsest, *pooled], 1)))
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + resize(laterals[i], laterals[i - 1].shape[2:])
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, laterals[:-1], strict=True)]
        outputs.append(laterals[-1])
        size = outputs[0].shape[2:]
        return self.fpn_bottleneck(torch.cat([resize(x, size) for x in outputs], 1))
