"""What a classifier takes for what: class_report.csv and confusion_matrix.png in the work dir."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from .classification_metric import Accuracy

# The numbers in the cells of a larger matrix could not be read.
MOST_NUMBERS = 20


@HOOKS.register_module()
class ClassReportHook(Hook):
    """Write, of the last evaluation, the figures of each class, and draw the confusion matrix.

    They are written after training and after a test, if the evaluator has an
    :class:`~linsight.heads.classification_metric.Accuracy`: ``class_report.csv`` with the columns
    ``class``, ``images``, ``accuracy`` (the share of the class's images that are right, also called
    recall), ``precision`` (the share that is right of the images taken for the class), both in
    percent and empty where there is no image, and ``mistaken_for``, the class that its wrong images
    are taken for most often; and ``confusion_matrix.png``.

    Args:
        most_classes: a matrix of more classes is not drawn.
    """

    priority = "LOW"

    def __init__(self, most_classes: int = 100) -> None:
        self.most_classes = most_classes

    def after_train(self, runner: Any) -> None:
        if runner.val_loop is not None:
            self._write(runner, runner.val_evaluator, runner.val_dataloader.dataset)

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self._write(runner, runner.test_evaluator, runner.test_dataloader.dataset)

    def _write(self, runner: Any, evaluator: Any, dataset: Any) -> None:
        found = [m for m in evaluator.metrics if isinstance(m, Accuracy) and m.labels]
        if not found or not is_main_process():
            return
        labels, guesses = np.array(found[0].labels), np.array(found[0].guesses)
        names = list(getattr(dataset, "metainfo", {}).get("classes") or ())
        names += [str(i) for i in range(len(names), max(labels.max(), guesses.max()) + 1)]
        matrix = np.zeros((len(names), len(names)), dtype=np.int64)
        np.add.at(matrix, (labels, guesses), 1)
        path = Path(runner.work_dir, "class_report.csv")
        write_report(matrix, names, path)
        runner.logger.info(f"Figures of each class: {path}")
        if len(names) <= self.most_classes:
            path = Path(runner.work_dir, "confusion_matrix.png")
            draw_confusion(matrix, names).savefig(path, dpi=150)
            runner.logger.info(f"Confusion matrix: {path}")


def write_report(matrix: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Write the columns of :class:`ClassReportHook`.

    Args:
        matrix: integers (classes, classes), the images of each class by the class that they are
            taken for.
        names: of the classes.
        path: of the file.
    """
    wrong = matrix - np.diag(np.diag(matrix))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("class", "images", "accuracy", "precision", "mistaken_for"))
        for i, name in enumerate(names):
            images, taken, right = matrix[i].sum(), matrix[:, i].sum(), matrix[i, i]
            writer.writerow(
                (
                    name,
                    images,
                    f"{100 * right / images:.2f}" if images else "",
                    f"{100 * right / taken:.2f}" if taken else "",
                    names[wrong[i].argmax()] if wrong[i].any() else "",
                )
            )


def draw_confusion(matrix: np.ndarray, names: Sequence[str]) -> Figure:
    """Draw a confusion matrix as in `write_report`; colours are shares of a class's images."""
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = max(4.0, 0.3 * len(names) + 2)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(picture, label="% of the class's images", shrink=0.8)
    axes.set(xlabel="taken for", ylabel="class")
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    if len(names) <= MOST_NUMBERS:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(
                    column, row, f"{count:,}", ha="center", va="center", color=colour, fontsize=8
                )
    return figure
