"""The simple feature pyramid of plain vision transformers (ViTDet, arXiv:2203.16527)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor, nn

# The stride of the patches for which the pyramid is defined.
PATCH = 16


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """The last map of a plain body as maps of several strides (section 3 of arXiv:2203.16527).

    The map of stride 16 is doubled by transposed convolutions for strides 8 and 4, and halved by
    max pooling for stride 32; each result is projected by a 1 x 1 and a 3 x 3 convolution, each
    with a layer norm. For strides of 64 and more, every second place of the map before is taken.

    Args:
        in_channels: channels of the one map that the body gives.
        out_channels: channels of each map of the pyramid.
        strides: of the maps in pixels, finest first, each 4 or more and twice the one before.
        in_stride: stride of the body's map in pixels, the side of its patches. The map is
            interpolated bilinearly to stride 16 if it has another one.
        norm_eps: epsilon of the layer norms.

    Raises:
        ValueError: there is more than one map, or `strides` are not as they must be.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        strides: Sequence[int] = (4, 8, 16, 32, 64),
        in_stride: int = PATCH,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if len(in_channels) != 1:
            raise ValueError(
                f"a SimpleFeaturePyramid takes one map, and the backbone gives {len(in_channels)}: "
                "give the index of one level as backbone.out_indices, or use an FPN"
            )
        doubled = all(b == 2 * a for a, b in pairwise(strides))
        if not strides or strides[0] not in (4, 8, 16, 32) or not doubled:
            raise ValueError(
                f"strides are {tuple(strides)}, expected 4, 8, 16 or 32, and then each twice the "
                "one before"
            )
        (channels,) = in_channels
        self.in_stride = in_stride
        self.strides = tuple(strides)
        self.out_channels = [out_channels] * len(strides)
        self.levels = nn.ModuleList()
        for stride in strides:
            if stride > 2 * PATCH:
                break
            scale, width = _scale(channels, stride, norm_eps)
            self.levels.append(
                nn.Sequential(
                    *scale,
                    nn.Conv2d(width, out_channels, 1, bias=False),
                    LayerNorm2d(out_channels, eps=norm_eps),
                    nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                    LayerNorm2d(out_channels, eps=norm_eps),
                )
            )

    def init_weights(self) -> None:
        """Nothing: the weights were initialised when they were created."""

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps (B, out_channels, H_i, W_i), one per stride, from one map (B, C, H, W)."""
        (x,) = maps
        if self.in_stride != PATCH:
            x = F.interpolate(x, scale_factor=self.in_stride / PATCH, mode="bilinear")
        pyramid = [level(x) for level in self.levels]
        while len(pyramid) < len(self.strides):
            pyramid.append(F.max_pool2d(pyramid[-1], 1, stride=2))
        return tuple(pyramid)


def _scale(channels: int, stride: int, norm_eps: float) -> tuple[list[nn.Module], int]:
    """Layers from a map of stride 16 to one of `stride`, and the channels of their result."""
    if stride == 2 * PATCH:
        return [nn.MaxPool2d(2, ceil_mode=True)], channels
    layers: list[nn.Module] = []
    if stride <= PATCH // 2:
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
        channels //= 2
    if stride == PATCH // 4:
        layers += [LayerNorm2d(channels, eps=norm_eps), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
        channels //= 2
    return layers, channels
