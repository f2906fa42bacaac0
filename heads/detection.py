"""mmdet's detectors on any timm model: the neck's input channels are the backbone's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdet.models import DINO, CascadeRCNN, MaskRCNN, RetinaNet
from mmengine.registry import MODELS

from linsight.backbones.initialization import shapes_only

from .backbone import TimmBackbone, is_plain


def neck_inputs(backbone: Mapping[str, Any], neck: Mapping[str, Any]) -> dict[str, Any]:
    """What a neck's arguments say of a :class:`TimmBackbone`'s maps; no weight is made or read.

    Channels of each map are ``in_channels``; of a `SimpleFeaturePyramid` the stride of the one map
    is ``in_stride``.

    Args:
        backbone: the backbone's arguments, as a config has them.
        neck: the neck's arguments.

    Raises:
        ValueError: timm knows no such model, an argument is out of its range, or the neck needs
            maps of several strides.
    """
    arguments = {key: value for key, value in backbone.items() if key not in ("type", "_scope_")}
    arguments |= {"pretrained": False, "checkpoint": None, "compile": False}
    with shapes_only():
        built = TimmBackbone(**arguments)
    pyramid = neck["type"] == "SimpleFeaturePyramid"
    if neck["type"] == "FPN" and is_plain(built.model.feature_info):
        raise ValueError(
            f"neck: {backbone['model_name']} has maps of the stride {built.out_strides[-1]} alone, "
            "and an FPN needs several: take "
            "neck=dict(type='SimpleFeaturePyramid', out_channels=256) instead"
        )
    return {"in_channels": built.out_channels} | (
        {"in_stride": built.out_strides[-1]} if pyramid else {}
    )


class ChannelsFromBackbone:
    """Gives the neck of a detector the channels of a `TimmBackbone`, before one of mmdet's classes.

    ::

        @MODELS.register_module()
        class TimmATSS(ChannelsFromBackbone, ATSS):
            pass

    Args:
        backbone: arguments of the backbone, with its ``type``.
        neck: arguments of the neck, with its ``type``. What they say of the backbone's maps is
            filled in where ``in_channels`` is missing and the backbone is a `TimmBackbone`.
        **options: arguments of mmdet's class.

    Raises:
        ValueError: timm knows no such model, an argument of the backbone is out of its range, or
            the neck is not for a body with maps of one stride.
    """

    def __init__(
        self, backbone: Mapping[str, Any], neck: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        if neck is not None and "in_channels" not in neck and backbone["type"] == "TimmBackbone":
            neck = {**neck, **neck_inputs(backbone, neck)}
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
