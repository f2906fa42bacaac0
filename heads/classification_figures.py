"""Figures of classification: evaluated images with their predicted labels."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from mmengine.registry import HOOKS

from .figures import PredictionsHook

_WRONG = "#c0392b"


@HOOKS.register_module()
class ClassesFigureHook(PredictionsHook):
    """Draw evaluated images with their predicted labels, and mark the wrong ones.

    The grid shows the first images that were classified correctly and, from its last row on, the
    first that were not.

    Args:
        rows: rows of the grid.
        columns: columns of the grid.
    """

    def __init__(self, rows: int = 4, columns: int = 8) -> None:
        self.rows = rows
        self.columns = columns

    def reset(self) -> None:
        self.right: list[tuple] = []
        self.wrong: list[tuple] = []
        self.seen = self.errors = 0

    def keep(self, data_batch: Any, outputs: Any) -> None:
        images, labels = data_batch
        predicted = torch.stack([output["scores"] for output in outputs]).argmax(1).cpu()
        for image, label, guess in zip(images, labels.tolist(), predicted.tolist(), strict=True):
            self.seen += 1
            self.errors += guess != label
            kept = self.right if guess == label else self.wrong
            if len(kept) < self.rows * self.columns:
                kept.append((image.cpu(), label, guess))

    def figure(self, metainfo: dict) -> Figure | None:
        if not self.seen:
            return None
        room = self.rows * self.columns
        # Wrong images get at least the last row, and more where there are few right ones.
        right = self.right[: room - self.columns * bool(self.wrong)]
        rows = -(-len(right) // self.columns)
        wrong = self.wrong[: room - rows * self.columns]
        return draw_predictions(
            right,
            wrong,
            metainfo,
            self.columns,
            f"{self.seen - self.errors:,} of {self.seen:,} images right "
            f"({1 - self.errors / self.seen:.2%})"
            + (f"; marked: {len(wrong)} of the {self.errors:,} wrong" if wrong else ""),
        )


def draw_predictions(
    right: list[tuple], wrong: list[tuple], metainfo: dict, columns: int, title: str
) -> Figure:
    """A grid of images with their predicted labels above them.

    Args:
        right: (normalised image (3, H, W), label, predicted label) of each correct prediction.
        wrong: the same of each wrong prediction; they are framed, on rows of their own.
        metainfo: ``classes``, ``mean`` and ``std`` of the data set, as far as they are known.
        columns: columns of the grid.
        title: title above the grid.
    """
    classes = metainfo.get("classes")
    mean, std = (torch.tensor(metainfo.get(k, v)) for k, v in (("mean", [0.0]), ("std", [1.0])))
    right_rows, wrong_rows = (-(-len(part) // columns) for part in (right, wrong))
    rows = max(1, right_rows + wrong_rows)
    figure = Figure(figsize=(1.25 * columns, 1.5 * rows + 0.5), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    cells = [*right, *[None] * (right_rows * columns - len(right)), *wrong]
    for axes, cell in zip(grid.flat, cells, strict=False):
        if cell is None:
            continue
        image, label, guess = cell
        picture = image.float() * std[:, None, None] + mean[:, None, None]
        axes.imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
        names = [_short(classes[i] if classes else i) for i in (guess, label)]
        if guess == label:
            axes.set_title(names[0], fontsize=9, pad=3)
            continue
        between = " " if len("".join(names)) < 8 else "\n"
        axes.set_title(f"{names[0]}{between}(is {names[1]})", fontsize=9, pad=3, color=_WRONG)
        axes.axis("on")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=_WRONG, linewidth=2)
    return figure


def _short(name: Any, most: int = 15) -> str:
    name = str(name)
    return name if len(name) <= most else name[: most - 1] + "…"
