"""Prediction by an exported file for `linsight predict`, drawn as its checkpoint's would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from linsight.heads.decode_head import resize
from linsight.heads.segmentation import window_starts
from linsight.tools import predict_classification, predict_segmentation
from linsight.tools.export_file import open_file
from linsight.tools.export_subject import preparation_of
from linsight.tools.prediction import Prediction
from linsight.tools.results import Classes, Objects, Regions, Result

_COLUMNS = {
    "classification": ("class", "probability"),
    "segmentation": ("class", "share of the pixels"),
    "detection": ("class", "score", "left", "top", "right", "bottom", "mask_pixels"),
}


class ExportedPredictor:
    """Predicts what the model in an exported file predicts, on the CPU.

    The picture is resized as the file says. A file for images of one size gets this size.

    Args:
        source: the file.
        topk: number of classes that a classifier reports.
        score: lowest score of the objects that a detector reports.

    Raises:
        CheckpointError: the file cannot be opened.
    """

    def __init__(self, source: str | Path, topk: int, score: float) -> None:
        self.file = open_file(source)
        self.task: str = self.file.description["task"]
        self.names: list[str] = list(map(str, self.file.description["classes"]))
        self.prepare = preparation_of(self.file.description)
        self.topk, self.score = topk, score

    @property
    def columns(self) -> tuple[str, ...]:
        return _COLUMNS[self.task]

    @torch.inference_mode()
    def predict(self, picture: Image.Image) -> Result:
        """The prediction as arrays."""
        return {
            "classification": self._classify,
            "segmentation": self._segment,
            "detection": self._detect,
        }[self.task](picture)

    def describe(self, picture: Image.Image, result: Result) -> Prediction:
        """What the file gave of a picture (RGB) as text, rows and a drawing."""
        if isinstance(result, Classes):
            return predict_classification.describe(picture, result, self.topk)
        if isinstance(result, Regions):
            return predict_segmentation.describe(picture, result)
        from linsight.tools import predict_detection

        return predict_detection.describe(picture, result)

    def __call__(self, picture: Image.Image) -> Prediction:
        return self.describe(picture, self.predict(picture))

    def _run(self, image: Tensor) -> dict[str, Tensor]:
        """What the file gives of an image (3, H, W).

        Raises:
            ValueError: the runtime refuses it, such as an image that is too small.
        """
        image = self._fit(image)
        side, least = min(image.shape[1:]), self.file.description["smallest_side"]
        # Some runtimes would compute something all the same.
        if side < least and None in self.file.sides:
            raise ValueError(f"a side of {side} pixels, and the file takes {least} or more")
        try:
            return self.file.run(image[None].contiguous())
        # Each runtime has errors of its own.
        except Exception as error:
            raise ValueError(str(error).strip().partition("\n")[0]) from error

    def _fit(self, image: Tensor) -> Tensor:
        """An image (3, H, W) of the size that the file takes."""
        sides = zip(self.file.sides, image.shape[1:], strict=True)
        size = [wanted or there for wanted, there in sides]
        return image if size == list(image.shape[1:]) else functional.resize(image, size)

    def _classify(self, picture: Image.Image) -> Classes:
        logits = self._run(self.prepare(picture))["logits"][0]
        return Classes(self.names, logits.softmax(-1).numpy())

    def _segment(self, picture: Image.Image) -> Regions:
        logits = resize(self._logits(self.prepare(picture)), picture.size[::-1])
        return Regions(self.names, logits[0].argmax(0).numpy())

    def _logits(self, image: Tensor) -> Tensor:
        """Logits (1, classes, H, W) of an image (3, H, W), by the windows of the model's config."""
        settings = self.file.description["preparation"]
        size = image.shape[1:]
        if "window" not in settings:
            return resize(self._run(image)["logits"], size)
        window = settings["window"]
        rows, columns = (
            window_starts(*each)
            for each in zip(size, window, settings["window_stride"], strict=True)
        )
        total: Any = image.new_zeros(1, len(self.names), *size, dtype=torch.float32)
        count = image.new_zeros(size, dtype=torch.float32)
        for y in rows:
            for x in columns:
                part = (..., slice(y, y + window[0]), slice(x, x + window[1]))
                view = image[part]
                logits = self._run(view)["logits"]
                total[part] += resize(logits, view.shape[-2:])
                count[part] += 1
        return total / count

    def _detect(self, picture: Image.Image) -> Objects:
        image, scale = self.prepare(picture)
        size = self._fit(image).shape
        scale = [
            factor * there / wanted
            for factor, there, wanted in zip(scale, size[:0:-1], image.shape[:0:-1], strict=True)
        ]
        found = {name: value[0] for name, value in self._run(image).items()}
        there = (found["labels"] >= 0) & (found["scores"] >= self.score)
        found = {name: value[there] for name, value in found.items()}
        masks = found.get("masks")
        if masks is not None and masks.shape[1:] != picture.size[::-1]:
            masks = resize(masks.float()[None], picture.size[::-1])[0] >= 0.5
        return Objects(
            self.names,
            boxes=(found["boxes"] / torch.tensor(scale).repeat(2)).numpy(),
            scores=found["scores"].numpy(),
            labels=found["labels"].long().numpy(),
            masks=None if masks is None else masks.numpy(),
        )
