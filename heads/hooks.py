"""What a training run does at its fixed points: seeding, resuming, showing how far it is."""

from __future__ import annotations

import atexit
import logging
import random
import sys
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Seed every generator at the start of each epoch from (seed, epoch, rank).

    An epoch is then the same whether the epochs before it ran in this process or in one
    that was killed. Data workers draw their seeds from torch's generator as they start, so
    they must start each epoch (``persistent_workers=False``).
    """

    priority = "VERY_HIGH"

    def before_train_epoch(self, runner: Any) -> None:
        sequence = np.random.SeedSequence((runner.seed, runner.epoch, get_rank()))
        for seed_generator, seed in zip(
            (random.seed, np.random.seed, torch.manual_seed),
            sequence.generate_state(3),
            strict=True,
        ):
            seed_generator(int(seed))


@HOOKS.register_module()
class ResumeValidationHook(Hook):
    """Repeat the last validation on resuming: a kill may have taken it, as the checkpoint is
    written before it. What it leaves behind is the same however often it runs."""

    priority = "LOWEST"

    def before_train(self, runner: Any) -> None:
        loop = runner.train_loop
        due = runner.epoch >= loop.val_begin and (
            runner.epoch % loop.val_interval == 0 or runner.epoch == runner.max_epochs
        )
        if runner._resume and runner.epoch and runner.val_loop is not None and due:
            runner.val_loop.run()


@HOOKS.register_module()
class ProgressBarHook(Hook):
    """On a terminal, one bar over the whole training instead of log lines.

    It shows epoch, loss, accuracy and the estimated end. Elsewhere this hook does nothing,
    and mmengine's log lines appear. The log file has them in either case.

    Args:
        metric: the validation metric to show.
        interval: iterations between two updates of the loss, which on a GPU has to wait for
            the computation.
    """

    priority = "BELOW_NORMAL"

    def __init__(self, metric: str = "accuracy/top1", interval: int = 10) -> None:
        self.metric = metric
        self.interval = interval
        self.progress: Progress | None = None

    def before_train(self, runner: Any) -> None:
        console = Console(file=sys.stdout)
        if not (is_main_process() and console.is_terminal):
            return
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  accuracy {task.fields[accuracy]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
        )
        self.levels = [(handler, handler.level) for handler in _console_handlers(runner.logger)]
        for handler, _ in self.levels:
            handler.setLevel("WARNING")
        self.task = self.progress.add_task(
            "train",
            total=runner.max_iters,
            completed=runner.iter,
            epoch=runner.epoch,
            epochs=runner.max_epochs,
            loss="-",
            accuracy="-",
        )
        self.progress.start()
        # A training that ends by an error leaves the terminal in order too.
        atexit.register(self.close)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        if self.progress is None:
            return
        fields = {"completed": runner.iter + 1, "epoch": runner.epoch + 1}
        if self.every_n_train_iters(runner, self.interval):
            fields["loss"] = f"{outputs['loss'].item():.3f}"
        self.progress.update(self.task, **fields)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        if self.progress is not None and self.metric in (metrics or {}):
            self.progress.update(self.task, accuracy=f"{metrics[self.metric]:.2f} %")

    def after_train(self, runner: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the terminal; the log lines appear again."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
            atexit.unregister(self.close)
            for handler, level in self.levels:
                handler.setLevel(level)


def _console_handlers(logger: logging.Logger) -> list[logging.Handler]:
    return [
        handler
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler)
        and not isinstance(handler, logging.FileHandler)
    ]
