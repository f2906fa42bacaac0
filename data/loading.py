"""Shared by the data sets: tolerance of damaged files, workers' seeds, checks against the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from mmengine.dataset import BaseDataset, dataset_wrapper
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, FUNCTIONS, HOOKS
from torch.utils.data import Dataset

# From the attribute of a data set that marks its faulty images to the fault and its consequence.
_FAULTS = {
    "corrupt": ("could not be read", "others took their places"),
    "unlabelled": ("have no labelled pixel", "nothing was learned from them"),
}


class DataError(ValueError):
    """A data set that is missing, empty, or too damaged to train on."""


def some(values: Iterable[Any], most: int = 3) -> str:
    """The first values, for a message, with dots if there are more than `most`."""
    shown = [str(value) for value in values]
    return ", ".join(shown[:most] + ["..."] * (len(shown) > most))


class TolerantDataset(Dataset):
    """A data set that skips items that cannot be read, and remembers them.

    Args:
        read: returns the item at an index.
        length: number of items.
        name_of: returns the file name of the item at an index.
        corrupt_tolerance: the largest share of items that may be unreadable.
        label_of: returns the class of the item at an index without reading its image; with None
            the classes of an item are those that its label holds.

    The functions are pickled where workers are not forked, and so may not be local ones.

    Attributes:
        metainfo: what mmengine keeps of the data set in a checkpoint, with its ``classes``.
        corrupt: bool (length,), whether an item could not be read. It lies in shared memory, so
            that every process sees what a data worker marks.
    """

    metainfo: dict[str, Any]

    def __init__(
        self,
        read: Callable[[int], Any],
        length: int,
        name_of: Callable[[int], str] = str,
        corrupt_tolerance: float = 0.01,
        label_of: Callable[[int], int] | None = None,
    ) -> None:
        self.read = read
        self.name_of = name_of
        self.label_of = label_of
        self.most_corrupt = most_corrupt(corrupt_tolerance, length)
        self.corrupt = flags(length)

    def __len__(self) -> int:
        return len(self.corrupt)

    def full_init(self) -> None:
        """Does nothing: mmengine's wrappers of data sets ask whether one has been read whole."""

    def get_cat_ids(self, index: int) -> list[int]:
        """The classes of an item, by which mmengine's ``ClassBalancedDataset`` draws it."""
        if self.label_of is not None:
            return [int(self.label_of(index))]
        _, (_, label) = self.read_from(index)
        classes = range(len(self.metainfo["classes"]))
        ignored = self.metainfo.get("ignore_index")
        return [int(i) for i in np.unique(label) if i in classes and i != ignored]

    def read_from(self, index: int) -> tuple[int, Any]:
        """The index of the first readable item from `index` on, and that item."""
        while True:
            try:
                item = self.read(index)
                break
            # Pillow raises OSError, SyntaxError, ValueError, struct.error, ..., depending on the
            # format of the file.
            except Exception as error:
                mark_corrupt(self, index, self.most_corrupt, error, str(error))
                index = (index + 1) % len(self)
        return index, item


def flags(length: int) -> torch.Tensor:
    """One flag per item in shared memory. Unlike a counter, workers set flags without a lock."""
    return torch.zeros(length, dtype=torch.bool).share_memory_()


def most_corrupt(tolerance: float, length: int) -> int:
    """How many of `length` items may be corrupt: `tolerance` is their share, and above 0 it
    allows at least one."""
    return max(1, int(tolerance * length)) if tolerance else 0


def mark_corrupt(dataset: Any, index: int, most: int, error: Exception, reason: str) -> None:
    """Remember an item that could not be read, in the data set's ``corrupt``.

    Raises:
        DataError: more than `most` items are corrupt, or all of them; the message ends with
            `reason`.
    """
    dataset.corrupt[index] = True
    if dataset.corrupt.sum() > most:
        raise DataError(
            f"{describe(dataset)}, more than corrupt_tolerance allows ({most}); the last error: "
            f"{reason}"
        ) from error
    if dataset.corrupt.all():
        raise DataError(
            f"none of the {len(dataset):,} images can be read; the last error: {reason}"
        ) from error


def describe(dataset: Any, fault: str = "corrupt") -> str:
    """A sentence that counts the faulty images of a data set and names the first five.

    Args:
        dataset: a data set that has ``name_of`` and flags its images in the attribute `fault`.
        fault: ``"corrupt"`` or ``"unlabelled"``.
    """
    bad = getattr(dataset, fault).nonzero().flatten().tolist()
    names = ", ".join(dataset.name_of(i) for i in bad[:5])
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    return f"{len(bad)} of {len(dataset):,} images {_FAULTS[fault][0]}: {names}{more}"


@DATASETS.register_module(force=True)
class ClassBalancedDataset(dataset_wrapper.ClassBalancedDataset):
    """mmengine's, which here also takes its ``ConcatDataset`` and ``RepeatDataset``."""

    def _get_repeat_factors(self, dataset: Any, repeat_thr: float) -> list[float]:
        if not hasattr(dataset, "get_cat_ids"):
            dataset.get_cat_ids = partial(_category_ids, dataset)
        return super()._get_repeat_factors(dataset, repeat_thr)


def _category_ids(dataset: Any, index: int) -> list[int]:
    """The classes of an item of a data set, through mmengine's wrappers of it."""
    while not isinstance(dataset, BaseDataset | TolerantDataset):
        inner = dataset._get_ori_dataset_idx(index)
        if hasattr(dataset, "datasets"):
            part, index = inner
            dataset = dataset.datasets[part]
        else:
            dataset, index = dataset.dataset, inner
    return dataset.get_cat_ids(index)


@FUNCTIONS.register_module()
def torch_worker_seed(worker_id: int) -> None:
    """Leave the seeds of a data worker as torch sets them from the main process's generator.

    mmengine's own function gives every epoch the same seeds, and with them the same augmentations.
    """


@HOOKS.register_module()
class DataCheckHook(Hook):
    """Compare the data sets with the model before training, and report faulty images.

    Raises:
        DataError: the data sets and the model have other numbers of classes or another label of
            pixels to ignore, or the data sets have other names of classes.
    """

    def __init__(self) -> None:
        self.told: list[Any] = []  # data sets whose absent classes were named

    def before_train(self, runner: Any) -> None:
        loops = {"training": runner.train_loop, "validation": runner.val_loop}
        named = {
            split: getattr(loop.dataloader.dataset, "metainfo", {}).get("classes")
            for split, loop in loops.items()
            if loop is not None
        }
        named = {split: classes for split, classes in named.items() if classes}
        for split, classes in named.items():
            _check_count(split, classes, runner.model)
        if len(named) == 2 and len(set(map(tuple, named.values()))) > 1:
            training, validation = (set(classes) for classes in named.values())
            only = sorted(training ^ validation)[:5]
            raise DataError(f"training and validation name other classes: {', '.join(only)}")

        _compare_statistics(runner, loops)
        for split, loop in loops.items():
            if loop is not None:
                _check_ignored(split, loop.dataloader.dataset, runner.model)

    def before_test(self, runner: Any) -> None:
        _check_ignored("test", runner.test_dataloader.dataset, runner.model)
        classes = getattr(runner.test_dataloader.dataset, "metainfo", {}).get("classes")
        if classes:
            _check_count("test", classes, runner.model)

    def after_train_epoch(self, runner: Any) -> None:
        self._report(runner, runner.train_dataloader.dataset, "training")

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self._report(runner, runner.val_dataloader.dataset, "validation")

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self._report(runner, runner.test_dataloader.dataset, "test")

    def _report(self, runner: Any, dataset: Any, split: str) -> None:
        # mmdet wraps data sets in data sets.
        for inner in getattr(dataset, "datasets", [getattr(dataset, "dataset", None)]):
            if inner is not None:
                self._report(runner, inner, split)
        for fault, (_, consequence) in _FAULTS.items():
            flagged = getattr(dataset, fault, None)
            if flagged is None:
                continue
            # Each rank has marked only images that it read itself.
            counts = flagged.to(torch.int32)
            all_reduce(counts)
            flagged.logical_or_(counts.bool().cpu())
            if flagged.any():
                runner.logger.warning(f"{split} data: {describe(dataset, fault)}; {consequence}")
        self._report_absent(runner, dataset, split)

    def _report_absent(self, runner: Any, dataset: Any, split: str) -> None:
        """Say once which classes no mask has shown in the first epoch."""
        seen = getattr(dataset, "seen", None)
        if seen is None or dataset in self.told:
            return
        self.told.append(dataset)
        counts = seen.to(torch.int32)
        all_reduce(counts)
        names = [
            name for name, n in zip(dataset.metainfo["classes"], counts, strict=False) if not n
        ]
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            runner.logger.warning(
                f"{split} data: no mask has shown a pixel of {len(names)} classes: "
                f"{', '.join(names[:5])}{more}"
            )


def _compare_statistics(runner: Any, loops: dict[str, Any]) -> None:
    """Warn where training and validation images are normalised by other numbers."""
    metas = [
        getattr(loop.dataloader.dataset, "metainfo", {})
        for loop in loops.values()
        if loop is not None
    ]
    for key in ("mean", "std"):
        values = [list(meta[key]) for meta in metas if key in meta]
        if len(values) == 2 and values[0] != values[1]:
            runner.logger.warning(
                f"training images are normalised by {key}={values[0]}, validation images by "
                f"{key}={values[1]}: set both to the same"
            )


def _check_ignored(split: str, dataset: Any, model: torch.nn.Module) -> None:
    """Compare the label of pixels that belong to no class with the model's."""
    theirs = getattr(dataset, "metainfo", {}).get("ignore_index")
    ours = getattr(getattr(model, "module", model), "ignore_index", None)
    if None not in (theirs, ours) and theirs != ours:
        raise DataError(
            f"model.ignore_index is {ours}, and the {split} data set has {theirs} where a pixel "
            f"belongs to no class: set the data loaders' dataset.ignore_index={ours}, or "
            f"model.ignore_index={theirs}"
        )


def _check_count(split: str, classes: Sequence[str], model: torch.nn.Module) -> None:
    """Compare the classes with the model's, or with those of each head of a detector."""
    for name, module in getattr(model, "module", model).named_modules():
        wanted = getattr(module, "num_classes", None)
        # A backbone has no classes of the data set, and an RPN separates objects of all classes
        # from the background.
        parts = set(name.split("."))
        foreign = parts & {"backbone", "rpn_head", "semantic_head"}
        if not isinstance(wanted, int) or foreign or len(classes) == wanted:
            continue
        key = ".".join(filter(None, ("model", name, "num_classes")))
        raise DataError(
            f"the {split} data set has {len(classes)} classes, and {key} is {wanted}: set "
            f"{key}={len(classes)}"
        )
