"""What the data sets share: files that are damaged, workers' seeds, the check against the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.registry import FUNCTIONS, HOOKS
from torch.utils.data import Dataset

CORRUPT = "could not be read"
UNLABELLED = "have no labelled pixel"
_CONSEQUENCES = {CORRUPT: "others took their places", UNLABELLED: "nothing was learned from them"}


class DataError(ValueError):
    """A data set that is missing, empty, or too damaged to train on."""


class TolerantDataset(Dataset):
    """A data set that steps over items that cannot be read, and remembers which.

    Args:
        read: gives the item of an index.
        length: how many.
        name_of: gives the file name of an index.
        corrupt_tolerance: the largest share of corrupt items.

    Attributes:
        flagged: by fault, whether an item has it, bool (length,); what a data worker marks
            there, every process sees.
    """

    def __init__(
        self,
        read: Callable[[int], Any],
        length: int,
        name_of: Callable[[int], str] = str,
        corrupt_tolerance: float = 0.01,
    ) -> None:
        self.read = read
        self.name_of = name_of
        self.most_corrupt = max(1, int(corrupt_tolerance * length)) if corrupt_tolerance else 0
        # A flag an item, not a count, needs no lock.
        self.flagged = {
            fault: torch.zeros(length, dtype=torch.bool).share_memory_() for fault in _CONSEQUENCES
        }

    def __len__(self) -> int:
        return len(self.flagged[CORRUPT])

    def read_from(self, index: int) -> tuple[int, Any]:
        """The first item from `index` on that can be read, and its index."""
        while True:
            try:
                item = self.read(index)
                break
            # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... as the format goes.
            except Exception as error:
                self.flagged[CORRUPT][index] = True
                if self.flagged[CORRUPT].sum() > self.most_corrupt:
                    raise DataError(
                        f"{describe_flagged(self, CORRUPT)}, more than corrupt_tolerance allows "
                        f"({self.most_corrupt}); the last error: {error}"
                    ) from error
                index = (index + 1) % len(self)
        return index, item


def describe_flagged(dataset: TolerantDataset, fault: str) -> str:
    """How many images of a data set have a fault, and which."""
    bad = dataset.flagged[fault].nonzero().flatten().tolist()
    names = ", ".join(dataset.name_of(i) for i in bad[:5])
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    return f"{len(bad)} of {len(dataset):,} images {fault}: {names}{more}"


@FUNCTIONS.register_module()
def torch_worker_seed(worker_id: int) -> None:
    """Leave a data worker's seeds as torch set them: from the main process's generator.

    mmengine's own gives every epoch the same seeds, and so the same augmentations.
    """


@HOOKS.register_module()
class DataCheckHook(Hook):
    """Compare the data sets with the model before training, and report faulty images.

    Raises:
        DataError: number or names of the classes do not agree.
    """

    def before_train(self, runner: Any) -> None:
        loops = {"training": runner.train_loop, "validation": runner.val_loop}
        named = {
            split: getattr(loop.dataloader.dataset, "metainfo", {}).get("classes")
            for split, loop in loops.items()
            if loop is not None
        }
        named = {split: classes for split, classes in named.items() if classes}
        model = getattr(runner.model, "module", runner.model)
        for split, classes in named.items():
            wanted = getattr(model, "num_classes", len(classes))
            if len(classes) != wanted:
                raise DataError(
                    f"the {split} data set has {len(classes)} classes, and model.num_classes is "
                    f"{wanted}: set model.num_classes={len(classes)}"
                )
        if len(named) == 2 and len(set(map(tuple, named.values()))) > 1:
            training, validation = (set(classes) for classes in named.values())
            only = sorted(training ^ validation)[:5]
            raise DataError(f"training and validation name other classes: {', '.join(only)}")

    def after_train_epoch(self, runner: Any) -> None:
        self._report(runner, runner.train_dataloader.dataset, "training")

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self._report(runner, runner.val_dataloader.dataset, "validation")

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self._report(runner, runner.test_dataloader.dataset, "test")

    def _report(self, runner: Any, dataset: Any, split: str) -> None:
        if not isinstance(dataset, TolerantDataset):
            return
        for fault, flags in dataset.flagged.items():
            # A rank knows of the images that it read.
            counts = flags.to(torch.int32)
            all_reduce(counts)
            flags.logical_or_(counts.bool().cpu())
            if flags.any():
                runner.logger.warning(
                    f"{split} data: {describe_flagged(dataset, fault)}; {_CONSEQUENCES[fault]}"
                )
