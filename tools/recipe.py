"""The config that fits a user's data: `linsight train --data` writes it, and then trains it."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from mmengine.config import Config
from safetensors.torch import save_file

from linsight.data.source_check import Report
from linsight.data.sources import Source, folder_of, write_lists
from linsight.tools.config import CONFIGS, ConfigError, override, quiet_mmdet
from linsight.tools.recipe_classification import classification
from linsight.tools.recipe_detection import detection
from linsight.tools.recipe_objects import COUNTED, Objects
from linsight.tools.recipe_segmentation import segmentation
from linsight.tools.recipe_start import Start, activation_bytes


@dataclass(frozen=True)
class Wishes:
    """What a user asks for; None leaves the choice to :func:`write_recipe`.

    Attributes:
        model: timm's name of the model.
        weights: ``"pretrained"``, ``"none"`` to train from scratch, or a file.
        epochs, batch_size, lr, image_size, seed, workers: as their names say; the image size is
            the side of a square, of detection the shorter side.
        frozen_stages: as for :func:`~linsight.heads.backbone.freeze_stages`.
        layer_decay: the rate of a layer over the rate of the next one, of a classifier.
        class_weights: weigh rare classes as much as frequent ones.
        patience: validations without an improvement after which the training ends; 0 for never.
    """

    model: str | None = None
    weights: str = "pretrained"
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    image_size: int | None = None
    seed: int = 0
    workers: int | None = None
    frozen_stages: int | None = None
    layer_decay: float | None = None
    class_weights: bool = False
    patience: int | None = None


@dataclass(frozen=True)
class Task:
    """How a task is trained.

    Attributes:
        runtime: file of configs/_base_ with the hooks.
        metric: what is validated, and chooses the best checkpoint.
        evaluator: the metric's config.
        lr: learning rate of AdamW at a batch of 64, from published weights.
        steps: number of iterations that a training has if epochs are not given, at least.
        most: largest batch that is chosen, on a GPU and without one.
        bytes: how much more memory a pass takes than that of its backbone.
        build: returns the model, the data loaders and the evaluator of a recipe.
    """

    runtime: str
    metric: str
    evaluator: dict[str, Any]
    lr: float
    steps: int
    most: tuple[int, int]
    bytes: float
    build: Callable[[Any], dict[str, Any]]


TASKS = {
    "classification": Task(
        "default_runtime.py",
        "accuracy/top1",
        {"type": "Accuracy", "topk": (1, 5)},
        lr=5e-4,
        steps=300,
        most=(128, 32),
        bytes=1.2,
        build=classification,
    ),
    "detection": Task(
        "detection_runtime.py",
        "coco/bbox_mAP",
        {"type": "QuietCocoMetric"},
        lr=4e-4,
        steps=600,
        most=(16, 4),
        bytes=2.5,
        build=detection,
    ),
    "segmentation": Task(
        "segmentation_runtime.py",
        "segmentation/mIoU",
        {"type": "MeanIoU"},
        lr=8e-4,
        steps=400,
        most=(16, 4),
        bytes=2.0,
        build=segmentation,
    ),
}
TASKS["instances"] = TASKS["detection"]
FILE = "config.py"
# Smaller images show one thing, whole.
WHOLE = 64
# From so many images on a classifier's batch is larger, where it learns from scratch.
MANY = 20_000


def write_recipe(
    source: Source,
    report: Report,
    wishes: Wishes,
    work_dir: Path,
    overrides: Sequence[str] = (),
) -> Path:
    """Write the config for a user's data into the work dir, with the lists of its files.

    Args:
        source: the data.
        report: what their check found; files that cannot be read are left out.
        wishes: what the user chose.
        work_dir: folder of the training.
        overrides: ``key=value`` words, see :func:`~linsight.tools.config.override`.

    Returns:
        The config's file. Comments in it say what each choice follows from.

    Raises:
        ConfigError: a choice is impossible.
        CheckpointError: there are no weights to start from.
    """
    start = Start.of(wishes.model, wishes.weights, source.task)
    for split, samples in source.splits.items():
        source.splits[split] = [s for s in samples if s.file not in report.corrupt]
        if source.task == "segmentation":
            source.splits[split] = [s for s in source.splits[split] if s.label not in report.masks]
    if source.splits and not all(source.splits[split] for split in ("train", "val")):
        raise ConfigError(f"{source.path}: no image is left to train or to validate on")
    lists = write_lists(source, work_dir / "data")
    if start.state is not None:
        start.checkpoint = str((work_dir / "data" / "backbone.safetensors").resolve())
        save_file({k: v.contiguous() for k, v in start.state.items()}, start.checkpoint)
    text = Recipe(source, report, wishes, start, lists).text(overrides)
    file = work_dir / FILE
    file.write_text(text, encoding="utf-8")
    return file


class Recipe:
    """What a config holds, chosen for the data, the wishes and this machine.

    Args:
        source, report, wishes: see :func:`write_recipe`.
        start: the model and its weights.
        lists: for each split the file that lists its images.
    """

    def __init__(
        self,
        source: Source,
        report: Report,
        wishes: Wishes,
        start: Start,
        lists: Mapping[str, str],
    ) -> None:
        self.source, self.wishes, self.start, self.lists = source, wishes, start, lists
        self.task = TASKS[source.task]
        self.report = report
        self.images = len(source.splits["train"]) if source.splits else 50000
        self.scratch = not (start.pretrained or start.checkpoint or start.load_from)
        small = bool(report.sizes) and max(report.median_size) < WHOLE
        self.whole = source.task == "classification" and small
        self.objects: Objects | None = None
        if source.task in ("detection", "instances"):
            self.objects = Objects.of(source)
        self.crowded = self.objects is not None and self.objects.most > COUNTED
        self.metric = "coco/bbox_mAP_50" if self.crowded else self.task.metric
        self.crop: int | None = None
        self.plain = source.task != "classification" and start.check_body(source.task)
        self.size, self.size_said = self._image_size()
        self.repeats = 1
        if self.objects and self.crop:
            self.repeats = self.objects.repeats(self.crop, self.images)
            self.images *= self.repeats
        self.batch, self.batch_said = self._batch_size()
        self.iterations = max(1, self.images // self.batch)
        # Random weights learn from an image often; published ones soon know it by heart.
        steps, least = (3 * self.task.steps, 40) if self.scratch else (self.task.steps, 10)
        self.epochs = wishes.epochs or min(100, max(least, math.ceil(steps / self.iterations)))
        self.steps = self.epochs * self.iterations
        # mmengine's LinearLR over a single iteration would stay at its first rate.
        self.warmup = max(2, min(self.steps // 20, 5 * self.iterations, 2000))
        rate = self.task.lr * (2 if self.scratch else 1) * math.sqrt(self.batch / 64)
        self.lr = float(f"{rate:.1e}") if wishes.lr is None else wishes.lr
        workers = min(16, max(1, (os.cpu_count() or 1) - 1))
        self.workers = workers if wishes.workers is None else wishes.workers
        self.interval = max(1, self.epochs // 20)

    def _image_size(self) -> tuple[int, str]:
        short, long = self.report.median_size
        if wish := self.wishes.image_size:
            if self.source.task != "classification" and wish < 32:
                raise ConfigError(f"--image-size is {wish}, expected 32 or more")
            if self.source.task == "classification" and self.start.fixed_input_size:
                self.start.options["img_size"] = wish
            return wish, "as asked"
        if self.source.task == "classification":
            if self.start.image_size:
                return self.start.image_size, "that of the weights"
            if self.start.fixed_input_size:
                return self.start.fixed, "the model takes no other"
            if not self.report.sizes:
                return self.start.fixed, "the model's own"
            size = min(self.start.fixed, max(64, 32 * math.ceil(2 * long / 32)))
            return size, f"the model's own is {self.start.fixed}, the images are {short} x {long}"
        most, least = (512, 64) if self.source.task == "segmentation" else (800, 128)
        size = min(most, max(least, 32 * round(short / 32)))
        if self.objects:
            self.crop = self.objects.crop(size)
        if self.objects and self.crop:
            middle = [np.median(s) for s in (self.objects.sides, self.objects.resized(size))]
            said = (
                f"crops of images that are not resized, for the objects are {middle[0]:.0f} pixels "
                f"in the middle, and would be {middle[1]:.0f} in images resized to {size}"
            )
            return self.crop, said
        return size, f"the images are {short} x {long}"

    def _batch_size(self) -> tuple[int, str]:
        if self.wishes.batch_size:
            return min(self.wishes.batch_size, self.images), "as asked"
        gpu = torch.cuda.is_available()
        room = 0.7 * _free_memory()
        need = self.task.bytes * activation_bytes(self.start, self._shape(), half=gpu)
        fits = max(1, int(room / need))
        most, more = self.task.most[not gpu], ""
        classifier = self.source.task == "classification"
        if gpu and self.scratch and classifier and self.images >= MANY:
            most, more = 2 * most, f"; from scratch on {MANY:,} images or more it is twice as large"
        # An epoch has eight iterations at least.
        batch = min(most, fits, max(2, self.images // 8))
        batch = 1 << (batch.bit_length() - 1)
        if self.source.task == "segmentation":
            batch = max(2, batch)  # batch norms need two values for each channel
        said = f"an image takes about {need / 2**20:.0f} MiB, and {room / 2**30:.1f} GiB are free"
        return min(batch, self.images), said + more

    def _shape(self) -> tuple[int, int]:
        if self.source.task in ("detection", "instances"):
            return self.size, self.long()
        return self.size, self.size

    def long(self) -> int:
        """The largest longer side of images in detection."""
        if self.crop:
            return self.size
        short, long = self.report.median_size
        return min(1333, 32 * math.ceil(self.size * max(1.34, long / short) / 32))

    def text(self, overrides: Sequence[str] = ()) -> str:
        """The config's text, with comments, changed as the words say."""
        with quiet_mmdet():
            runtime = Config.fromfile(CONFIGS / "_base_" / self.task.runtime)
        values = self.task.build(self)
        optimizer = {"opt": "adamw", "lr": self.lr, "weight_decay": 0.05}
        if self.wishes.layer_decay and self.source.task != "classification":
            raise ConfigError(
                f"--layer-decay is for classifiers, and the data are for {self.source.task}"
            )
        if self.wishes.layer_decay:
            optimizer["layer_decay"] = self.wishes.layer_decay
        hooks = dict(runtime.default_hooks)
        hooks["logger"] = {"type": "LoggerHook", "interval": max(1, min(50, self.iterations))}
        hooks["checkpoint"] = {
            "type": "SafeCheckpointHook",
            "interval": self.interval,
            "max_keep_ckpts": 1,
            "save_best": self.metric,
        }
        if self.crowded:
            shown = [
                self.metric,
                *(["coco/segm_mAP_50"] if self.source.task == "instances" else []),
            ]
            for name in ("progress_bar", "learning_curve"):
                hooks[name] = {**hooks[name], "metrics": shown}
        if self.scratch and self.start.has_progressive_layers():
            # About the share of training that their authors give SLAB-Swin and SLAB-DeiT.
            hooks["norm_progress"] = {
                "type": "NormProgressHook",
                "iterations": max(1, self.steps // 6),
            }
        hooks["ema"] = {
            "type": "BatchScaledEMAHook",
            "decay": round(1 - 1 / (2 + self.steps / 20), 5),
            "base_batch_size": self.batch,
            "update_buffers": True,
        }
        patience = self.wishes.patience
        if patience is None:
            patience = max(5, math.ceil(self.epochs / self.interval / 2))
        if patience:
            hooks["early_stopping"] = {
                "type": "EarlyStoppingHook",
                "monitor": self.metric,
                "rule": "greater",
                "min_delta": 0.0,
                "patience": patience,
            }
        gpu = torch.cuda.is_available()
        wrapper: dict[str, Any] = {"type": "OptimWrapper"}
        if gpu:
            wrapper = {"type": "AmpOptimWrapper", "dtype": "bfloat16", "loss_scale": 1.0}
        wrapper |= {
            "constructor": "TimmOptimWrapperConstructor",
            "optimizer": optimizer,
            "clip_grad": {"max_norm": 5.0},
        }
        schedule = [
            {
                "type": "LinearLR",
                "start_factor": 0.01,
                "by_epoch": False,
                "begin": 0,
                "end": self.warmup,
            },
            {
                "type": "CosineAnnealingLR",
                "eta_min": self.lr / 100,
                "T_max": max(1, self.steps - self.warmup),
                "begin": self.warmup,
                "end": max(self.steps, self.warmup + 1),
                "by_epoch": False,
            },
        ]
        loops = {
            "train_cfg": {
                "by_epoch": True,
                "max_epochs": self.epochs,
                "val_interval": self.interval,
            },
            "val_cfg": {},
            "test_cfg": {},
        }
        s = self.source
        weights = self.start.load_from
        groups: list[tuple[str, dict[str, Any]]] = [
            (
                f"The data: {s.path}, {s.format}, for {s.task}; classes: {len(s.classes)}.\n"
                + "".join(f"{_sentence(note)}\n" for note in s.notes),
                {"data_root": str(folder_of(s)) if s.splits else "data"},
            ),
            (
                f"{self.start.name}, from {self.start.said}.\n{self._objects_said()}",
                {"model": values["model"]},
            ),
            (
                f"Images of {self.size} pixels: {self.size_said}.\n"
                f"A batch of {self.batch}: {self.batch_said}.\n{self._crops_said()}",
                {
                    key: values[key]
                    for key in ("train_dataloader", "val_dataloader", "test_dataloader")
                },
            ),
            (
                self._evaluation_said(),
                {f"{split}_evaluator": self._evaluator(values, split) for split in ("val", "test")},
            ),
            (
                f"{self.epochs} epochs of {self.iterations} iterations: {self.steps} in all, of "
                f"which {self.warmup} warm up.\n"
                "With other max_epochs, change end and T_max of the schedule, or call linsight "
                "train CONFIG --epochs N, which does.",
                {"optim_wrapper": wrapper, "param_scheduler": schedule, **loops},
            ),
            (
                "The averaged weights (ema), which are validated and saved, reach back a "
                "twentieth of the training.",
                {"default_hooks": hooks},
            ),
            (
                "",
                {
                    "custom_imports": runtime.custom_imports,
                    "default_scope": runtime.default_scope,
                    "runner_type": "SafeRunner",
                    "env_cfg": runtime.env_cfg,
                    "randomness": {"seed": self.wishes.seed},
                    "log_level": "INFO",
                    "load_from": weights,
                    "resume": False,
                },
            ),
        ]
        head = (
            "# Written by `linsight train --data`. Edit it, and train it again by\n"
            f"# `linsight train {FILE} --work-dir ANOTHER`.\n\n"
        )
        if overrides:
            config = Config({key: value for _, part in groups for key, value in part.items()})
            override(config, overrides)
            changed = config.to_dict()
            groups = [(said, {key: changed.pop(key) for key in part}) for said, part in groups]
            groups.append((f"The command line said {' '.join(overrides)}.", changed))
        return head + "\n".join(_lines(comment, values) for comment, values in groups)

    def _crops_said(self) -> str:
        """How much of a classifier's images is cropped away, in words."""
        if not self.whole:
            return ""
        return (
            f"Images of less than {WHOLE} pixels show one thing, whole: crops keep 60 % of them at "
            "least, and RandAugment, which is made for photographs of 224 pixels, is left out."
        )

    def _objects_said(self) -> str:
        """What of a detector's model follows from the objects, in words."""
        if not self.objects:
            return ""
        anchor = self.objects.anchor(self.seen())
        return (
            f"The smallest anchors have {anchor:.0f} pixels, and {self.objects.kept} objects of an "
            f"image are kept, of which the most crowded has {self.objects.most}."
        )

    def seen(self) -> np.ndarray:
        """The sides of the objects as a detector sees them, in pixels."""
        objects = cast(Objects, self.objects)
        return objects.sides if self.crop else objects.resized(self.size)

    def _evaluation_said(self) -> str:
        """What is special in the evaluation, in words."""
        if not self.crowded:
            return ""
        most = cast(Objects, self.objects).most
        return (
            f"An image has up to {most} objects, of which COCO's mean precision counts {COUNTED} "
            "alone: the precision at an overlap of 50 % takes its place."
        )

    def _evaluator(self, values: Mapping[str, Any], split: str) -> dict[str, Any]:
        if self.source.task not in ("detection", "instances"):
            return values["evaluator"]
        return {**values["evaluator"], "ann_file": self.lists.get(split) or self.lists["val"]}

    def loaders(self, train: dict, test: dict, collate: str, val_batch: int) -> dict[str, Any]:
        """The data loaders of data sets by their split, and of how many images they validate."""
        common = {
            "num_workers": self.workers,
            "collate_fn": {"type": collate},
            "worker_init_fn": {"type": "torch_worker_seed"},
        }
        evaluate = {
            "batch_size": val_batch,
            **common,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
        }
        splits = {"val": "val", "test": "test" if "test" in self.lists else "val"}
        loaders = {f"{s}_dataloader": {**evaluate, "dataset": test[of]} for s, of in splits.items()}
        return {
            "train_dataloader": {
                "batch_size": self.batch,
                **common,
                "drop_last": True,
                "sampler": {"type": "DefaultSampler", "shuffle": True},
                "dataset": train["train"],
            },
            **loaders,
        }

    def backbone(self) -> dict[str, Any]:
        """Arguments of the backbone in the config."""
        frozen = self.wishes.frozen_stages
        return self.start.backbone() | ({} if frozen is None else {"frozen_stages": frozen})


def _sentence(note: str) -> str:
    """A note as a sentence; names of files, which begin some, stay as they are."""
    named = "." in note.split()[0]
    return f"{note if named else note[0].upper() + note[1:]}."


def _lines(comment: str, values: Mapping[str, Any]) -> str:
    lines = [part for line in comment.splitlines() for part in textwrap.wrap(line, 96)]
    said = "".join(f"# {line}\n" for line in lines)
    return said + Config(dict(values)).pretty_text


def _free_memory() -> int:
    """Free bytes of the GPU, or of this machine if there is none."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
