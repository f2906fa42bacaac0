"""Mean intersection over union of semantic segmentation, with torchmetrics."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from rich.console import Console
from rich.table import Table
from torch import Tensor


@METRICS.register_module()
class MeanIoU(BaseMetric):
    """mIoU, mAcc and aAcc over all pixels of the data set, in percent.

    The IoU of a class is the number of its correctly predicted pixels divided by the number of
    pixels that belong to it, are predicted as it, or both. Its Acc is the number of its correctly
    predicted pixels divided by the number of pixels that belong to it. A class that is neither in
    the labels nor in the predictions has no IoU, and a class that is not in the labels has no Acc;
    mIoU and mAcc are the means over the other classes. A class that is ignored has neither. aAcc is
    the share of correctly predicted pixels.

    Args:
        ignore_index: label of pixels that are not counted; by default the data set's.
        table: print IoU and Acc of each class.
        collect_device: device on which the ranks' results are gathered, ``"cpu"`` or ``"gpu"``.
        prefix: prefix of the metrics' names, as in ``segmentation/mIoU``.
    """

    default_prefix = "segmentation"
    # Names of the values, without the prefix.
    names = ("mIoU", "mAcc", "aAcc")

    dataset_meta: dict[str, Any]

    def __init__(
        self,
        ignore_index: int | None = None,
        table: bool = False,
        collect_device: str = "cpu",
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.ignore_index = ignore_index
        self.table = table

    def process(self, data_batch: tuple[Tensor, Tensor], data_samples: Sequence[dict]) -> None:
        from torchmetrics.functional.classification import multiclass_stat_scores

        classes = len(self.dataset_meta["classes"])
        ignored = self.ignore_index
        if ignored is None:
            ignored = self.dataset_meta.get("ignore_index", 255)
        for labels, sample in zip(data_batch[1], data_samples, strict=True):
            predicted = sample["labels"]
            counts = multiclass_stat_scores(
                predicted,
                labels.to(predicted.device),
                num_classes=classes,
                average="none",
                ignore_index=ignored,
                validate_args=False,
            )
            # The columns are true positives, false positives, true negatives, false negatives, and
            # pixels of the class.
            counts = counts[:, [0, 1, 4]].cpu().numpy()
            if 0 <= ignored < classes:
                counts[ignored] = 0
            self.results.append(counts)

    def compute_metrics(self, results: list[np.ndarray]) -> dict[str, float]:
        right, wrong, labelled = np.sum(results, 0).T
        with np.errstate(invalid="ignore"):
            iou = 100 * right / (wrong + labelled)
            accuracy = 100 * right / labelled
            pixels = 100 * right.sum() / labelled.sum()
        if self.table:
            print_table(self.dataset_meta["classes"], iou, accuracy)
        return {"mIoU": _mean(iou), "mAcc": _mean(accuracy), "aAcc": float(pixels)}


def _mean(values: np.ndarray) -> float:
    """The mean over the classes that have a value; NaN if no class has one."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def print_table(classes: Sequence[str], iou: np.ndarray, accuracy: np.ndarray) -> None:
    """Print IoU and Acc of each class, or "absent" where a class has no value."""
    table = Table("class")
    for name in ("IoU", "Acc"):
        table.add_column(name, justify="right")
    for name, *values in zip(classes, iou, accuracy, strict=True):
        table.add_row(str(name), *("absent" if np.isnan(v) else f"{v:.2f}" for v in values))
    Console(file=sys.stdout).print(table)
