"""Semantic segmentation of pictures for `linsight predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from mmengine.registry import MODELS
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.utils import reparameterize_model
from torch import Tensor
from torchvision.transforms import v2

from linsight.backbones.checkpoint import check_fit
from linsight.backbones.graphs import capture_inference
from linsight.data.segmentation import build_transforms
from linsight.heads.segmentation import SemanticSegmentor
from linsight.heads.segmentation_figures import legend, overlay
from linsight.tools.model import Run
from linsight.tools.prediction import Prediction, render


class SegmentationPredictor:
    """Predicts the class of each pixel of a picture, as for the test data of the training.

    Args:
        run: content of the checkpoint of a semantic segmentor.
        source: file of the checkpoint, for messages.
        device: device to run it on.

    Raises:
        CheckpointError: the weights do not fit the model that the checkpoint names.
    """

    columns = ("class", "share of the pixels")

    def __init__(self, run: Run, source: str | Path, device: torch.device) -> None:
        self.model = build_segmentor(run, source).to(device)
        for part in (self.model.backbone, self.model.neck, self.model.decode_head):
            if part is not None:
                capture_inference(part)
        self.device = device
        self.classes = run.classes or tuple(map(str, range(self.model.num_classes)))
        dataset = run.config.test_dataloader.dataset
        self.transforms = build_transforms(dataset.get("transforms", ()))
        self.mean = dataset.get("mean", IMAGENET_DEFAULT_MEAN)
        self.std = dataset.get("std", IMAGENET_DEFAULT_STD)

    @torch.inference_mode()
    def __call__(self, picture: Image.Image) -> Prediction:
        original = v2.functional.to_image(picture)
        image = v2.functional.to_dtype(self.transforms(original), torch.float32, scale=True)
        image = v2.functional.normalize(image, self.mean, self.std)
        labels = self.model(image[None].to(self.device), mode="predict", size=original.shape[-2:])[
            0
        ]["labels"].cpu()
        return describe_labels(original, labels, self.classes)


def build_segmentor(run: Run, source: str | Path) -> SemanticSegmentor:
    """The segmentor of a checkpoint, in evaluation mode, its constants folded.

    Raises:
        CheckpointError: the weights do not fit the model that the checkpoint names.
    """
    settings: dict[str, Any] = dict(run.config.model) | {"checkpoint": None}
    settings["backbone"] = settings["backbone"] | {"pretrained": False, "checkpoint": None}
    model: SemanticSegmentor = MODELS.build(settings).eval()
    state = model.checkpoint_filter_fn(run.state)
    check_fit(state, model, f"checkpoint {source} does not fit the model that it names")
    model.load_state_dict(state)
    return reparameterize_model(model, inplace=True)


def describe_labels(picture: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Prediction:
    """The prediction of a segmentor for a picture.

    Args:
        picture: uint8 (3, H, W).
        labels: class of each pixel, (H, W).
        classes: names of the classes.
    """
    counts = torch.bincount(labels.flatten(), minlength=len(classes))
    order = counts.argsort(descending=True)[: int((counts > 0).sum())].tolist()
    shares = [(classes[i], counts[i].item() / labels.numel()) for i in order]
    return Prediction(
        summary=", ".join(f"{name} {share:.1%}" for name, share in shares[:3]),
        rows=[(name, f"{share:.6f}") for name, share in shares],
        drawing=render(draw_classes(picture, labels, classes)),
    )


def draw_classes(picture: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Figure:
    """A picture beside its copy with the classes in colour, and a legend of these classes.

    Args:
        picture: uint8 (3, H, W).
        labels: class of each pixel, (H, W).
        classes: names of the classes.
    """
    height, width = labels.shape
    side = 5.0
    figure = Figure(figsize=(2 * side, side * height / width + 0.6), layout="constrained")
    for axes, cell in zip(
        figure.subplots(1, 2), (picture, overlay(picture, labels, classes)), strict=True
    ):
        smooth = None if max(height, width) >= 200 else "nearest"
        axes.imshow(cell.permute(1, 2, 0).numpy(), interpolation=smooth)
        axes.axis("off")
    handles = legend(classes, labels.unique().tolist())
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(8, len(handles)), frameon=False
        )
    return figure
