"""Figures of detection: pictures with boxes and masks, and a run's evaluated images with theirs."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from mmengine.registry import HOOKS
from PIL import Image, ImageDraw, ImageFont

from .figures import PredictionsHook

# Approximate smallest length of the longer side of a drawing, in pixels.
_LEAST = 384
# The classes of more objects would hide the picture.
_WRITTEN = 100


def draw_objects(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray | None = None,
    masks: np.ndarray | None = None,
    names: Sequence[str] | None = None,
) -> Image.Image:
    """A picture with its objects, one colour per class, the highest score on top.

    Small pictures are enlarged, so that the text is readable. More than 100 objects are drawn
    without text.

    Args:
        image: uint8 (H, W, 3), RGB.
        boxes: (N, 4), x1 y1 x2 y2 in pixels.
        labels: int (N,), the classes.
        scores: (N,), 0 to 1, written beside the class.
        masks: bool (N, H, W).
        names: names of the classes.
    """
    order = range(len(boxes)) if scores is None else np.argsort(scores, kind="stable")
    scale = max(1, round(_LEAST / max(image.shape[:2])))
    canvas = image.repeat(scale, 0).repeat(scale, 1)
    boxes = boxes * scale
    if masks is not None:
        masks = masks.repeat(scale, 1).repeat(scale, 2)
        for i in order:
            colour = np.array(class_colour(int(labels[i])), np.float32)
            canvas[masks[i]] = 0.5 * canvas[masks[i]] + 0.5 * colour
    picture = Image.fromarray(canvas)
    pen = ImageDraw.Draw(picture)
    height = int(np.clip(min(picture.size) / 28, 10, 28))
    # Pillow's own font has no letters but those of ASCII.
    font = ImageFont.truetype(findfont("DejaVu Sans"), size=height)
    for i in order:
        colour = class_colour(int(labels[i]))
        x1, y1, x2, y2 = (float(edge) for edge in boxes[i])
        pen.rectangle(
            (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=max(1, height // 9)
        )
        if len(boxes) > _WRITTEN:
            continue
        text = str(names[labels[i]] if names else int(labels[i]))
        if scores is not None:
            text += f" {scores[i]:.2f}"
        # The text stands above the box, or inside it where there is no room above.
        top = y1 - height - 2 if y1 > height + 2 else y1
        room = pen.textbbox((x1 + 1, top), text, font=font)
        pen.rectangle((x1, top, room[2] + 1, top + height + 2), fill=colour)
        pen.text((x1 + 1, top), text, fill="white", font=font)
    return picture


@cache
def class_colour(label: int) -> tuple[int, int, int]:
    """The colour (R, G, B) of a class, dark enough for white text; consecutive classes lie far
    apart on the colour wheel."""
    hue = label * 0.61803398875 % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, 0.8)
    return round(255 * red), round(255 * green), round(255 * blue)


@HOOKS.register_module()
class ObjectsFigureHook(PredictionsHook):
    """Draw the first evaluated images twice: with their annotations, and with what was found.

    Args:
        rows: rows of the grid.
        columns: columns of the grid, of which each holds both pictures of an image.
        score_threshold: lowest score of the objects that are drawn.
    """

    def __init__(self, rows: int = 4, columns: int = 3, score_threshold: float = 0.5) -> None:
        self.rows = rows
        self.columns = columns
        self.score_threshold = score_threshold

    def reset(self) -> None:
        self.kept: list[tuple] = []

    def keep(self, data_batch: Any, outputs: Any) -> None:
        room = self.rows * self.columns - len(self.kept)
        # Under test-time augmentation a sample has several images, of which none is the original.
        if isinstance(data_batch["inputs"][0], list | tuple):
            return
        for image, sample in zip(data_batch["inputs"][:room], outputs, strict=False):
            found = detections(sample, self.score_threshold)
            self.kept.append((_picture(image, sample), _annotations(sample), found))

    def figure(self, metainfo: dict) -> Figure | None:
        if not self.kept:
            return None
        rows = -(-len(self.kept) // self.columns)
        figure = Figure(figsize=(6 * self.columns, 3 * rows + 0.4), layout="constrained")
        figure.suptitle(
            f"Left: as annotated. Right: found with a score of {self.score_threshold} or more"
        )
        grid = figure.subplots(rows, 2 * self.columns, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        names = metainfo.get("classes")
        for i, (image, annotated, found) in enumerate(self.kept):
            left = 2 * (i % self.columns)
            for axes, objects in zip(
                grid[i // self.columns, left : left + 2], (annotated, found), strict=True
            ):
                axes.imshow(draw_objects(image, **objects, names=names))
        return figure


def detections(sample: Any, score_threshold: float) -> dict[str, Any]:
    """Arguments ``boxes``, ``labels``, ``scores`` and ``masks`` of :func:`draw_objects`, from the
    predictions in mmdet's ``DetDataSample``."""
    objects = sample.pred_instances
    objects = objects[objects.scores >= score_threshold].cpu()
    return {
        "boxes": objects.bboxes.float().numpy(),
        "labels": objects.labels.numpy(),
        "scores": objects.scores.float().numpy(),
        "masks": np.asarray(objects.masks, bool) if "masks" in objects else None,
    }


def _annotations(sample: Any) -> dict[str, Any]:
    """Arguments ``boxes``, ``labels`` and ``masks`` of :func:`draw_objects`, from the annotations
    in mmdet's ``DetDataSample``, which test pipelines load at the size before resizing."""
    if "gt_instances" not in sample:
        return {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "masks": None}
    objects = sample.gt_instances.cpu()
    boxes = objects.bboxes
    return {
        # mmdet wraps the boxes of some pipelines.
        "boxes": np.asarray(getattr(boxes, "tensor", boxes), np.float32),
        "labels": np.asarray(objects.labels),
        "masks": objects.masks.to_ndarray().astype(bool) if "masks" in objects else None,
    }


def _picture(image: Any, sample: Any) -> np.ndarray:
    """The RGB picture of an image in a batch, BGR (3, H, W), at its size before resizing and
    padding."""
    height, width = sample.img_shape[:2]
    picture = image[[2, 1, 0], :height, :width].permute(1, 2, 0).cpu().numpy().astype(np.uint8)
    return np.asarray(Image.fromarray(picture).resize(sample.ori_shape[1::-1]))
