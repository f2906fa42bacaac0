"""Classification of pictures for `linsight predict`."""

from __future__ import annotations

from typing import Any

import timm.data
import torch
from matplotlib.figure import Figure
from PIL import Image
from timm.utils import reparameterize_model
from torch import Tensor

from linsight.backbones.checkpoint import CheckpointError, TimmModel
from linsight.backbones.graphs import capture_inference
from linsight.tools.model import class_names
from linsight.tools.prediction import Prediction, render
from linsight.tools.results import Classes

# Pillow's modes of pictures by their number of channels.
_MODES = {1: "L", 3: "RGB"}


class ClassificationPredictor:
    """Predicts the most probable classes of a picture.

    Args:
        model: a timm model, as :func:`~linsight.tools.model.open_model` returns it.
        device: device to run it on.
        topk: number of classes per picture.

    Raises:
        CheckpointError: the model takes images that no picture is.
    """

    columns = ("class", "probability")

    def __init__(self, model: TimmModel, device: torch.device, topk: int) -> None:
        self.model = capture_inference(reparameterize_model(model).to(device))
        self.device, self.topk = device, topk
        self.names = class_names(model)
        data = timm.data.resolve_model_data_config(model)
        self.mode = mode_of(data["input_size"][0])
        self.mean, self.std = data["mean"], data["std"]
        self.transform: Any = timm.data.create_transform(**data)

    def prepare(self, picture: Image.Image) -> Tensor:
        """The image (1, C, H, W) that the model gets of a picture."""
        return self.transform(picture.convert(self.mode))[None].to(self.device)

    @torch.inference_mode()
    def predict(self, picture: Image.Image) -> Classes:
        """The probability of each class."""
        scores = self.model(self.prepare(picture))[0].float().softmax(-1)
        return Classes(self.names, scores.cpu().numpy())

    def describe(self, picture: Image.Image, result: Classes) -> Prediction:
        """The most probable classes of a picture (RGB) as text, rows and a drawing."""
        return describe(picture, result, self.topk)

    def __call__(self, picture: Image.Image) -> Prediction:
        return self.describe(picture, self.predict(picture))


def mode_of(channels: int) -> str:
    """Pillow's mode of the pictures of a model.

    Raises:
        CheckpointError: pictures have no such number of channels.
    """
    if channels not in _MODES:
        raise CheckpointError(
            f"the model takes images of {channels} channels, and a picture has "
            f"{' or '.join(map(str, _MODES))}"
        )
    return _MODES[channels]


def describe(picture: Image.Image, classes: Classes, topk: int) -> Prediction:
    """The `topk` most probable classes of a picture (RGB) as text, rows and a drawing."""
    best = classes.top(topk)
    return Prediction(
        summary=", ".join(f"{name} {p:.1%}" for name, p in best[:3]),
        rows=[(name, f"{p:.6f}") for name, p in best],
        drawing=render(draw_classes(picture, best)),
    )


def draw_classes(picture: Image.Image, best: list[tuple[str, float]]) -> Figure:
    """A picture beside a bar chart of its most probable classes.

    Args:
        picture: the picture (RGB).
        best: names and probabilities, the most probable class first.
    """
    figure = Figure(figsize=(7, 3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    left.imshow(picture, interpolation="nearest" if max(picture.size) < 200 else None)
    left.axis("off")
    names, shares = zip(*reversed(best), strict=True)
    bars = right.barh([name[:28] for name in names], shares, color="#2a6f97")
    right.bar_label(bars, [f"{share:.1%}" for share in shares], padding=3)
    right.set(xlim=(0, 1.18), xticks=[])
    right.spines[["top", "right", "bottom"]].set_visible(False)
    return figure
