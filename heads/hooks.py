"""Hooks of a training run: seeds, losses, progressive norms, validation on resuming, the progress
bar.

A run counts in epochs or, under mmengine's ``IterBasedTrainLoop``, in iterations.
"""

from __future__ import annotations

import atexit
import logging
import random
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank, is_main_process
from mmengine.hooks import (
    CheckpointHook,
    EarlyStoppingHook,
    Hook,
    LoggerHook,
    RuntimeInfoHook,
)
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..backbones.norms import set_training_progress


def training_progress(runner: Any) -> tuple[str, int, int]:
    """The unit that a run counts in, ``"epoch"`` or ``"iteration"``, the number done, and the
    total."""
    if isinstance(runner.train_loop, EpochBasedTrainLoop):
        return "epoch", runner.epoch, runner.max_epochs
    return "iteration", runner.iter, runner.max_iters


def percent(metric: str, value: float) -> float:
    """The value of a metric in percent.

    linsight's metrics are in percent. mmdet's COCO metrics are shares of 1, or -1 where the data
    hold no object of the kind.
    """
    return 100 * value if metric.startswith("coco/") and value >= 0 else value


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Seed every random generator at the start of each epoch from (seed, epoch, rank).

    An epoch is then the same whether the epochs before it ran in this process or in one that was
    killed. Data workers draw their seeds from torch's generator when they start, so they must be
    started in each epoch (``persistent_workers=False``).

    A run that counts in iterations is one epoch, and the generators are seeded for each iteration
    of the model. Its data are the same if workers load them.
    """

    priority = "VERY_HIGH"

    def before_train_epoch(self, runner: Any) -> None:
        self._seed(runner, runner.epoch)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        unit, done, _ = training_progress(runner)
        if unit == "iteration":
            self._seed(runner, done)

    @staticmethod
    def _seed(runner: Any, done: int) -> None:
        sequence = np.random.SeedSequence((runner.seed, done, get_rank()))
        for seed_generator, seed in zip(
            (random.seed, np.random.seed, torch.manual_seed),
            sequence.generate_state(3),
            strict=True,
        ):
            seed_generator(int(seed))


@HOOKS.register_module()
class AsyncRuntimeInfoHook(RuntimeInfoHook):
    """mmengine's record of losses and of the norms of clipped gradients, without waiting for a GPU.

    mmengine reads each of them as soon as its kernel is launched, so that the GPU has nothing to do
    while the host prepares the next iteration. This hook copies them to the host meanwhile, and
    records those of an iteration after the launches of the next two. What is logged, drawn or kept
    in a checkpoint is complete; between two logged iterations the message hub is two behind.

    :class:`~linsight.heads.runner.SafeRunner` has it in the place of mmengine's.
    """

    # Iterations that the host may be ahead of the device: one to prepare, one for a slow moment.
    ahead = 2

    def __init__(self) -> None:
        self.norms: dict[str, Tensor] = {}
        self.pending: deque[_Copy] = deque()

    def before_train(self, runner: Any) -> None:
        super().before_train(runner)
        wrapper = runner.optim_wrapper
        if isinstance(wrapper, OptimWrapper) and wrapper.clip_grad_kwargs:
            self._take_norms(wrapper)

    def _take_norms(self, wrapper: OptimWrapper) -> None:
        clip = wrapper.clip_func

        def clip_and_keep(*arguments: Any, **options: Any) -> None:
            """Clip, and return None: mmengine would read a norm."""
            norm = clip(*arguments, **options)
            if norm is not None:
                whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
                self.norms[f"train/{wrapper.grad_name}"] = whole

        wrapper.clip_func = clip_and_keep

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        losses = {f"train/{name}": value for name, value in (outputs or {}).items()}
        self.pending.append(_Copy({**self.norms, **losses}))
        self.norms.clear()
        self._record(runner, 0 if self._is_read(runner, batch_idx) else self.ahead)

    def before_val(self, runner: Any) -> None:
        self._record(runner)
        super().before_val(runner)

    def after_train(self, runner: Any) -> None:
        self._record(runner)
        super().after_train(runner)

    def _record(self, runner: Any, left: int = 0) -> None:
        while len(self.pending) > left:
            for name, value in self.pending.popleft().read().items():
                runner.message_hub.update_scalar(name, value)

    def _is_read(self, runner: Any, batch_idx: int) -> bool:
        """Whether a hook of mmengine's reads the message hub in this iteration."""
        if self.end_of_epoch(runner.train_dataloader, batch_idx) or self.is_last_train_iter(runner):
            return True
        return any(
            self.every_n_inner_iters(batch_idx, hook.interval)
            or self.every_n_train_iters(runner, hook.interval)
            for hook in runner.hooks
            if isinstance(hook, LoggerHook)
            or (isinstance(hook, CheckpointHook) and not hook.by_epoch)
        )


class _Copy:
    """Values that are on their way to the host."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values, self.arrived = {}, None
        for name, value in values.items():
            if isinstance(value, Tensor):
                if value.is_cuda and self.arrived is None:
                    # One that sleeps leaves the core to the data workers.
                    self.arrived = torch.cuda.Event(blocking=True)
                # A copy even on the host: the next iteration may overwrite what it is given.
                value = value.detach().to("cpu", non_blocking=True, copy=True)
            self.values[name] = value
        if self.arrived is not None:
            self.arrived.record()

    def read(self) -> dict[str, Any]:
        """The values, once they are all there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values


@HOOKS.register_module()
class NormProgressHook(Hook):
    """Move progressive norms from layer to batch normalisation, as SLAB trains them.

    Before each iteration the norms of the model are told the share of the transition that is
    done; see :func:`linsight.backbones.norms.set_training_progress`. A resumed run continues at
    its iteration.

    Args:
        iterations: the length of the transition, after which the norms are batch norms.

    Raises:
        ValueError: if ``iterations`` is below 1.
    """

    def __init__(self, iterations: int) -> None:
        if iterations < 1:
            raise ValueError(
                f"iterations is {iterations}, expected at least 1, the length of the transition"
            )
        self.iterations = iterations
        self.told: float | None = None

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        progress = min(1.0, runner.iter / self.iterations)
        # After the transition nothing changes any more.
        if progress != self.told:
            set_training_progress(runner.model, progress)
            self.told = progress


@HOOKS.register_module()
class ResumeValidationHook(Hook):
    """Repeat the last validation on resuming, as an unbroken run had it.

    A checkpoint is written before the validation, which a kill may have prevented, and on whose
    results the best checkpoint, ``ReduceOnPlateauLR`` and ``EarlyStoppingHook`` depend. The results
    are the same however often a validation runs. It is not repeated if the checkpoint is from after
    it, as one in the middle of an epoch is. The state of ``EarlyStoppingHook``, which mmengine
    forgets, is kept in the checkpoint.
    """

    priority = "LOWEST"

    def __init__(self) -> None:
        # The epochs or iterations after which the last validation ran.
        self.validated_at: int | None = None

    def before_train(self, runner: Any) -> None:
        loop = runner.train_loop
        unit, done, end = training_progress(runner)
        if not runner._resume or not done:
            return
        begin = done * len(loop.dataloader) if unit == "epoch" else runner.iter
        if runner.iter != begin:
            runner.logger.warning(
                f"the checkpoint is of iteration {runner.iter}, and epoch {done + 1} begins anew, "
                f"which here is at iteration {begin}: the weights will not be those of an unbroken "
                "run, as they are where checkpoints are written by epoch"
            )
        loop._decide_current_val_interval()
        due = done >= loop.val_begin and (done % loop.val_interval == 0 or done == end)
        if runner.val_loop is not None and due and self.validated_at != done:
            runner.val_loop.run()

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        if not isinstance(runner._train_loop, dict | None):
            _, self.validated_at, _ = training_progress(runner)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        checkpoint["validated_at"] = self.validated_at
        checkpoint["early_stopping"] = [
            {"wait_count": hook.wait_count, "best_score": float(hook.best_score)}
            for hook in _early_stopping(runner)
        ]

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        if runner._resume:
            self.validated_at = checkpoint.get("validated_at")
            states = checkpoint.get("early_stopping", ())
            for hook, state in zip(_early_stopping(runner), states, strict=False):
                hook.wait_count, hook.best_score = state["wait_count"], state["best_score"]


def _early_stopping(runner: Any) -> list[EarlyStoppingHook]:
    return [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]


@HOOKS.register_module()
class ProgressBarHook(Hook):
    """On a terminal, show one bar over the whole training instead of log lines.

    The bar shows epoch, loss, validation metrics and the time left. Without a terminal this hook
    does nothing, and mmengine's log lines appear. The log file has them in either case.

    Args:
        metrics: names of the validation metrics to show; those that the evaluator does not return
            are left out.
        interval: iterations between two updates of the loss. On a GPU each update waits for the
            computation.
    """

    priority = "BELOW_NORMAL"

    def __init__(self, metrics: Sequence[str] = ("accuracy/top1",), interval: int = 10) -> None:
        self.metrics = tuple(metrics)
        self.interval = interval
        self.progress: Progress | None = None

    def before_train(self, runner: Any) -> None:
        console = Console(file=sys.stdout)
        if not (is_main_process() and console.is_terminal):
            return
        self.progress = Progress(
            TextColumn("{task.fields[epoch]}"),
            # The bar and the metrics share what the others leave of the line.
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn(
                "{task.fields[metrics]}",
                table_column=Column(ratio=3, no_wrap=True, overflow="ellipsis"),
            ),
            console=console,
            expand=True,
        )
        self.levels = [(handler, handler.level) for handler in _console_handlers(runner.logger)]
        for handler, _ in self.levels:
            handler.setLevel("WARNING")
        self.task = self.progress.add_task(
            "train",
            total=runner.max_iters,
            completed=runner.iter,
            epoch=self._epoch(runner),
            loss="-",
            metrics=self._text({}),
        )
        self.progress.start()
        # The terminal is restored when an error ends the training, too.
        atexit.register(self.close)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        if self.progress is None:
            return
        fields = {"completed": runner.iter + 1, "epoch": self._epoch(runner)}
        if outputs is not None and self.every_n_train_iters(runner, self.interval):
            fields["loss"] = f"{outputs['loss'].item():.3f}"
        self.progress.update(self.task, **fields)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        if self.progress is not None and metrics:
            self.progress.update(self.task, metrics=self._text(metrics))

    def after_train(self, runner: Any) -> None:
        self.close()

    @staticmethod
    def _epoch(runner: Any) -> str:
        unit, done, end = training_progress(runner)
        return f"epoch {min(done + 1, end)}/{end}" if unit == "epoch" else ""

    def _text(self, values: dict[str, float]) -> str:
        # A detector without masks, for example, has no precision of masks.
        known = [name for name in self.metrics if name in values]
        return "  ".join(
            f"{name.rpartition('/')[2]} {percent(name, values[name]):.2f} %" for name in known
        )

    def close(self) -> None:
        """Remove the bar from the terminal and show log lines again."""
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
