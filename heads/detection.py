"""mmdet's detectors on any timm model: the neck's input channels are the backbone's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdet.models import DINO, CascadeRCNN, MaskRCNN, RetinaNet
from mmengine.registry import MODELS

from linsight.backbones.initialization import shapes_only

from .backbone import TimmBackbone


def map_channels(backbone: Mapping[str, Any]) -> list[int]:
    """Channels of each map that a :class:`TimmBackbone` gives; no weight is made or read.

    Args:
        backbone: its arguments, as a config has them.

    Raises:
        ValueError: timm knows no such model, or an argument is out of its range.
    """
    arguments = {key: value for key, value in backbone.items() if key not in ("type", "_scope_")}
    arguments |= {"pretrained": False, "checkpoint": None, "compile": False}
    with shapes_only():
        return TimmBackbone(**arguments).out_channels


class ChannelsFromBackbone:
    """Gives the neck of a detector the channels of a `TimmBackbone`, before one of mmdet's classes.

    ::

        @MODELS.register_module()
        class TimmATSS(ChannelsFromBackbone, ATSS):
            pass

    Args:
        backbone: arguments of the backbone, with its ``type``.
        neck: arguments of the neck, with its ``type``. ``in_channels`` is filled in where it is
            missing and the backbone is a `TimmBackbone`.
        **options: arguments of mmdet's class.

    Raises:
        ValueError: timm knows no such model, or an argument of the backbone is out of its range.
    """

    def __init__(
        self, backbone: Mapping[str, Any], neck: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        if neck is not None and "in_channels" not in neck and backbone["type"] == "TimmBackbone":
            neck = {**neck, "in_channels": map_channels(backbone)}
        options |= {"backbone": backbone, "neck": neck}
        super().__init__(**options)


@MODELS.register_module()
class TimmRetinaNet(ChannelsFromBackbone, RetinaNet):
    """mmdet's RetinaNet (arXiv:1708.02002) on a timm model."""


@MODELS.register_module()
class TimmMaskRCNN(ChannelsFromBackbone, MaskRCNN):
    """mmdet's Mask R-CNN (arXiv:1703.06870) on a timm model."""


@MODELS.register_module()
class TimmCascadeRCNN(ChannelsFromBackbone, CascadeRCNN):
    """mmdet's Cascade R-CNN and Cascade Mask R-CNN (arXiv:1906.09756) on a timm model."""


@MODELS.register_module()
class TimmDINO(ChannelsFromBackbone, DINO):
    """mmdet's DINO (arXiv:2203.03605) on a timm model."""
