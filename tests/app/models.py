"""Checkpoints of small models with random weights, for each task of `linsight app`."""

from pathlib import Path

import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import linsight.heads  # noqa: F401
from linsight.tools.config import load_config

from ..backbones.conftest import lively

SMALL = ["model.backbone.depths=(1,0,0,1)"]
CONFIGS = {
    "classifier": "rala_vit_nano_digits",
    "segmentor": "segformer_rala_vit_nano_digits",
    "detector": "mask_rcnn_rala_vit_nano_fpn_digits",
}


def write_checkpoint(task: str, folder: Path) -> Path:
    """Write the checkpoint of a model that tells pictures apart, though it has learned nothing."""
    config = load_config(CONFIGS[task], SMALL)
    with DefaultScope.overwrite_default_scope(config.get("default_scope") or "mmengine"):
        model = MODELS.build(config.model).eval()
    if task == "detector":
        _scatter(model)
    else:
        lively(model)
    names = [*"0123456789"]
    classes = ("background", *names) if task == "segmentor" else names
    meta = {"cfg": config.pretty_text, "dataset_meta": {"classes": classes}}
    path = folder / f"{task}.pth"
    torch.save({"meta": meta, "state_dict": model.state_dict()}, path)
    return path


def _scatter(detector: nn.Module) -> None:
    """Let the objects of an image differ in score."""
    torch.manual_seed(0)
    for name, weight in detector.named_parameters():
        if weight.ndim == 1 or any(word in name for word in ("_cls", "_reg")):
            weight.data += 0.03 * torch.randn(weight.shape)
