"""Classification of pictures for `linsight predict`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm.data
import torch
from matplotlib.figure import Figure
from PIL import Image
from timm.utils import reparameterize_model
from torch import Tensor

from linsight.backbones.checkpoint import TimmModel
from linsight.backbones.graphs import capture_inference
from linsight.tools.model import class_names
from linsight.tools.prediction import Prediction, render


class ClassificationPredictor:
    """Predicts the most probable classes of a picture.

    Args:
        model: a timm model, as :func:`~linsight.tools.model.open_model` returns it.
        device: device to run it on.
        topk: number of classes per picture.
    """

    columns = ("class", "probability")

    def __init__(self, model: TimmModel, device: torch.device, topk: int) -> None:
        self.model = capture_inference(reparameterize_model(model).to(device))
        self.device, self.topk = device, topk
        self.names = class_names(model)
        self.transform: Any = timm.data.create_transform(
            **timm.data.resolve_model_data_config(model)
        )

    @torch.inference_mode()
    def __call__(self, picture: Image.Image) -> Prediction:
        logits = self.model(self.transform(picture)[None].to(self.device))[0]
        return describe_logits(picture, logits, self.names, self.topk)


def describe_logits(
    picture: Image.Image, logits: Tensor, names: Sequence[str], topk: int
) -> Prediction:
    """The prediction of a classifier for a picture (RGB), of its logits (num_classes,)."""
    top = logits.float().softmax(-1).topk(min(topk, len(names)))
    best = [(names[i], p) for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
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
