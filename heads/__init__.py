"""Tasks on top of a backbone: classification, detection and semantic segmentation.

Importing it registers everything here with mmengine, and provides the operators of mmcv that
detectors need, wherever mmcv is installed without them.
"""

from linsight.kernels import mmcv_operators as mmcv_operators

from . import (
    averaging,
    backbone,
    checkpoint,
    class_report,
    classification,
    classification_figures,
    classification_metric,
    fcn,
    figures,
    hooks,
    linearisation,
    optim,
    runner,
    segformer,
    segmentation,
    segmentation_figures,
    segmentation_loss,
    segmentation_metric,
    semantic_fpn,
    sharding,
    simple_feature_pyramid,
    upernet,
)

__all__ = [
    "averaging",
    "backbone",
    "checkpoint",
    "class_report",
    "classification",
    "classification_figures",
    "classification_metric",
    "fcn",
    "figures",
    "hooks",
    "linearisation",
    "optim",
    "runner",
    "segformer",
    "segmentation",
    "segmentation_figures",
    "segmentation_loss",
    "segmentation_metric",
    "semantic_fpn",
    "sharding",
    "simple_feature_pyramid",
    "upernet",
]
