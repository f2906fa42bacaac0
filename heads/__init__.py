"""What stands on a backbone: classification, detection and segmentation.

Importing it registers everything here with mmengine.
"""

from . import (
    backbone,
    checkpoint,
    classification,
    classification_figures,
    classification_metric,
    fcn,
    figures,
    hooks,
    optim,
    segformer,
    segmentation,
    segmentation_figures,
    segmentation_loss,
    segmentation_metric,
    semantic_fpn,
    upernet,
)

__all__ = [
    "backbone",
    "checkpoint",
    "classification",
    "classification_figures",
    "classification_metric",
    "fcn",
    "figures",
    "hooks",
    "optim",
    "segformer",
    "segmentation",
    "segmentation_figures",
    "segmentation_loss",
    "segmentation_metric",
    "semantic_fpn",
    "upernet",
]
