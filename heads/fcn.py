"""A fully convolutional head (Long et al., arXiv:1411.4038), as an auxiliary one."""

from __future__ import annotations

from typing import Any

from mmengine.registry import MODELS
from torch import Tensor, nn

from .decode_head import ConvModule, DecodeHead


@MODELS.register_module()
class FCNHead(DecodeHead):
    """Convolutions of 3 x 3 on one map.

    Args:
        channels: of the convolutions.
        num_convs: how many.
        in_index: which map, one number.
        **kwargs: see :class:`DecodeHead`.
    """

    def __init__(
        self,
        *args: Any,
        channels: int = 256,
        num_convs: int = 1,
        in_index: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, channels=channels, in_index=[in_index], **kwargs)
        self.convs = nn.Sequential(
            *(
                ConvModule(channels if i else self.in_channels[0], channels, 3)
                for i in range(num_convs)
            )
        )

    def decode(self, maps: list[Tensor]) -> Tensor:
        return self.convs(maps[0])
