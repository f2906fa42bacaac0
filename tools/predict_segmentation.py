"""Semantic segmentation of pictures for `linsight predict`."""

from __future__ import annotations

from collections.abc import Sequence
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
from linsight.data.mask_transforms import build_transforms
from linsight.data.segmentation import named_colours
from linsight.heads.segmentation import SemanticSegmentor
from linsight.heads.segmentation_figures import Colour, legend, overlay
from linsight.tools.model import Run
from linsight.tools.prediction import Prediction, render
from linsight.tools.results import Regions


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
        self.model: Any = build_segmentor(run, source).to(device)
        for part in (self.model.backbone, self.model.neck, self.model.decode_head):
            if part is not None:
                capture_inference(part)
        self.device = device
        dataset = run.config.test_dataloader.dataset
        names, self.palette = named_colours(dataset.get("type", "")) or (None, None)
        self.classes = run.classes or names or tuple(map(str, range(self.model.num_classes)))
        self.names = list(self.classes)
        if names and len(names) != self.model.num_classes:
            self.palette = None
        self.transforms = build_transforms(dataset.get("transforms", ()))
        self.mean = dataset.get("mean", IMAGENET_DEFAULT_MEAN)
        self.std = dataset.get("std", IMAGENET_DEFAULT_STD)

    def prepare(self, picture: Image.Image) -> Tensor:
        """The image (1, 3, H, W) that the model gets of a picture (RGB)."""
        image = self.transforms(v2.functional.to_image(picture))
        image = v2.functional.to_dtype(image, torch.float32, scale=True)
        return v2.functional.normalize(image, self.mean, self.std)[None].to(self.device)

    @torch.inference_mode()
    def predict(self, picture: Image.Image) -> Regions:
        """The class of each pixel."""
        image = self.prepare(picture)
        (found,) = self.model(image, mode="predict", size=picture.size[::-1])
        return Regions(self.names, found["labels"].cpu().numpy())

    def describe(self, picture: Image.Image, result: Regions) -> Prediction:
        """The classes of a picture's (RGB) pixels as text, rows and a drawing."""
        return describe(picture, result, self.palette)

    def __call__(self, picture: Image.Image) -> Prediction:
        return self.describe(picture, self.predict(picture))


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
    reparameterize_model(model, inplace=True)
    return model


def describe(
    picture: Image.Image, regions: Regions, palette: Sequence[Colour] | None = None
) -> Prediction:
    """The classes of a picture's (RGB) pixels as text, rows and a drawing.

    Args:
        picture: the picture.
        regions: the classes.
        palette: as :func:`draw_classes` takes it.
    """
    shares = list(regions.shares().items())
    labels = torch.from_numpy(regions.labels)
    original = v2.functional.to_image(picture)
    return Prediction(
        summary=", ".join(f"{name} {share:.1%}" for name, share in shares[:3]),
        rows=[(name, f"{share:.6f}") for name, share in shares],
        drawing=render(draw_classes(original, labels, tuple(regions.names), palette)),
    )


def draw_classes(
    picture: Tensor,
    labels: Tensor,
    classes: tuple[str, ...],
    palette: Sequence[Colour] | None = None,
) -> Figure:
    """A picture beside its copy with the classes in colour, and a legend of these classes.

    Args:
        picture: uint8 (3, H, W).
        labels: class of each pixel, (H, W).
        classes: names of the classes.
        palette: their colours, or None for others than the data set's usual ones.
    """
    height, width = labels.shape
    side = 5.0
    figure = Figure(figsize=(2 * side, side * height / width + 0.6), layout="constrained")
    coloured = overlay(picture, labels, classes, palette=palette)
    for axes, cell in zip(figure.subplots(1, 2), (picture, coloured), strict=True):
        smooth = None if max(height, width) >= 200 else "nearest"
        axes.imshow(cell.permute(1, 2, 0).numpy(), interpolation=smooth)
        axes.axis("off")
    handles = legend(classes, labels.unique().tolist(), palette)
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(8, len(handles)), frameon=False
        )
    return figure
