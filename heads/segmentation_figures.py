"""Figures of semantic segmentation: classes in colour over the image."""

from __future__ import annotations

import colorsys
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import color_sequences
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from mmengine.registry import HOOKS
from torch import Tensor
from torchvision.transforms import v2
from torchvision.utils import draw_segmentation_masks

from .figures import PredictionsHook

#: Name of the class that gets no colour.
BACKGROUND = "background"


Colour = tuple[int, int, int]


def class_colours(
    classes: Sequence[str], palette: Sequence[Colour] | None = None
) -> dict[int, Colour]:
    """The colour (R, G, B), 0 to 255, of each class but the background, by index of the class.

    Args:
        classes: names of the classes.
        palette: the colours that are usual for the data set, or None for others.
    """
    if palette is not None:
        return dict(enumerate(palette))
    coloured = [i for i, name in enumerate(classes) if name != BACKGROUND]
    shades: list[Any] = [*color_sequences["tab10"]]
    del shades[7]  # grey, the colour of the picture under the classes
    golden = (5**0.5 - 1) / 2
    shades += (
        colorsys.hsv_to_rgb((0.44 + i * golden) % 1, (0.9, 0.5)[i // 8 % 2], 0.95)
        for i in range(len(coloured) - len(shades))
    )
    return {
        i: (round(255 * red), round(255 * green), round(255 * blue))
        for i, (red, green, blue) in zip(coloured, shades, strict=False)
    }


def overlay(
    picture: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    alpha: float = 0.75,
    palette: Sequence[Colour] | None = None,
) -> Tensor:
    """A picture in grey, uint8 (3, H, W), overlaid with the colour of each pixel's class.

    Args:
        picture: uint8 (3, H, W).
        labels: class of each pixel, (H, W). Background and values that are no class stay grey.
        classes: names of the classes.
        alpha: opacity of the colour.
        palette: as in `class_colours`.
    """
    grey = v2.functional.rgb_to_grayscale(picture, num_output_channels=3)
    colours = class_colours(classes, palette)
    present = [i for i in labels.unique().tolist() if i in colours]
    if not present:
        return grey
    masks = labels == torch.tensor(present)[:, None, None]
    return draw_segmentation_masks(grey, masks, alpha, [colours[i] for i in present])


def legend(
    classes: Sequence[str], present: Collection[int], palette: Sequence[Colour] | None = None
) -> list[Patch]:
    """Entries of a legend with the colours of the classes `present`."""
    colours = class_colours(classes, palette)
    return [
        Patch(color=tuple(np.array(colours[i]) / 255), label=str(classes[i]))
        for i in sorted(present)
        if i in colours
    ]


@HOOKS.register_module()
class MasksFigureHook(PredictionsHook):
    """Draw the first evaluated images beside their true and their predicted classes.

    Args:
        rows: rows of the grid.
        columns: images per row; each is drawn three times.
    """

    def __init__(self, rows: int = 4, columns: int = 2) -> None:
        self.rows = rows
        self.columns = columns

    def reset(self) -> None:
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(self, data_batch: Any, outputs: Any) -> None:
        images, labels = data_batch
        for image, truth, output in zip(images, labels, outputs, strict=True):
            if len(self.kept) < self.rows * self.columns:
                self.kept.append((image.cpu(), truth.cpu(), output["labels"].cpu()))

    def figure(self, metainfo: dict) -> Figure | None:
        return draw_masks(self.kept, metainfo, self.columns) if self.kept else None


def draw_masks(
    images: Sequence[tuple[Tensor, Tensor, Tensor]], metainfo: dict, columns: int
) -> Figure:
    """A grid of images, each beside its true and its predicted classes.

    Args:
        images: (normalised image (3, H, W), true labels, predicted labels) of each image.
        metainfo: ``classes``, ``mean`` and ``std`` of the data set, and its ``palette`` if it has
            one.
        columns: images per row.
    """
    classes, palette = metainfo["classes"], metainfo.get("palette")
    mean, std = (torch.tensor(metainfo[key])[:, None, None] for key in ("mean", "std"))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(5.4 * columns, 1.85 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, 3 * columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    present: set[int] = set()
    for index, (image, truth, guess) in enumerate(images):
        picture = ((image.float() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
        if picture.shape[1:] != truth.shape:
            size = truth.shape
            picture = torch.nn.functional.interpolate(picture[None].float(), size)[0].byte()
        present |= {*truth.unique().tolist(), *guess.unique().tolist()}
        row, column = divmod(index, columns)
        truth, guess = (overlay(picture, each, classes, palette=palette) for each in (truth, guess))
        for cell, name, axes in zip(
            (picture, truth, guess),
            ("image", "truth", "prediction"),
            grid[row, 3 * column :],
            strict=False,
        ):
            axes.imshow(cell.permute(1, 2, 0).numpy(), interpolation="nearest")
            if row == 0:
                axes.set_title(name, fontsize=10)
    handles = legend(classes, present, palette)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(10, len(handles) or 1), frameon=False
    )
    return figure
