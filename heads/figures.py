"""The two figures of a run in its work_dir: learning_curve.png and predictions.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from .hooks import percent, training_progress

_STYLE = {"color": "#2166ac", "linewidth": 1.8}
_COLOURS = ("#2166ac", "#d6604d", "#4d9221", "#8073ac")


@HOOKS.register_module()
class LearningCurveHook(Hook):
    """Draw loss, validation metrics and learning rate over the training: learning_curve.png.

    Args:
        metrics: names of the validation metrics to draw; those that the evaluator does not return
            are left out.
    """

    priority = "LOW"

    def __init__(self, metrics: Sequence[str] = ("accuracy/top1",)) -> None:
        self.metrics = tuple(metrics)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        # The message hub is part of a checkpoint, so that the history survives a resume.
        history = runner.message_hub.get_info("history", {})
        _, done, _ = training_progress(runner)
        history[done] = dict(metrics or {})
        runner.message_hub.update_info("history", history)

    def after_train(self, runner: Any) -> None:
        if not is_main_process():
            return
        hub = runner.message_hub
        if "train/loss" not in hub.log_scalars:
            return
        history = hub.get_info("history", {})
        path = Path(runner.work_dir, "learning_curve.png")
        unit, _, _ = training_progress(runner)
        curves = {
            name: {at: percent(name, m[name]) for at, m in history.items() if name in m}
            for name in self.metrics
        }
        draw_learning_curve(
            hub.get_scalar("train/loss").data[0],
            hub.get_scalar("train/lr").data[0],
            {name: curve for name, curve in curves.items() if curve},
            len(runner.train_dataloader) if unit == "epoch" else None,
        ).savefig(path, dpi=150)
        runner.logger.info(f"Learning curve: {path}")


def draw_learning_curve(
    losses: np.ndarray,
    rates: np.ndarray,
    metrics: dict[str, dict[int, float]],
    epoch_length: int | None,
) -> Figure:
    """Three panels over the training: loss, metrics and learning rate.

    Args:
        losses: training loss of each iteration.
        rates: learning rate of each iteration.
        metrics: for each name of a validation metric its values in percent, by epoch or by
            iteration; each metric has at least one value.
        epoch_length: iterations per epoch; None if the training counts in iterations.
    """
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    unit = "epoch" if epoch_length else "iteration"
    at = np.arange(1, len(losses) + 1) / (epoch_length or 1)
    # Without epochs the means are over a fiftieth of the training each.
    length = epoch_length or max(1, len(losses) // 50)
    whole = len(losses) // length * length
    thin = max(1, len(losses) // 2000)

    left.plot(at[::thin], losses[::thin], color="#9ec5e8", linewidth=0.7)
    if whole:
        means = losses[:whole].reshape(-1, length).mean(1)
        label = "mean of epoch" if epoch_length else f"mean of {length}"
        left.plot(at[length - 1 : whole : length], means, marker=".", label=label, **_STYLE)
        left.legend(frameon=False)
        # The high losses of the first iterations would flatten the rest of the curve.
        left.set_ylim(*_span(losses, means))
    left.set_title("Training loss")

    middle.set_title(f"Validation {', '.join(map(_short_name, metrics))} (%)" if metrics else "")
    for (name, values), colour in zip(metrics.items(), _COLOURS, strict=False):
        best = max(values, key=values.__getitem__)
        label = f"{_short_name(name)}, best: {values[best]:.2f} in {unit} {best}"
        style = _STYLE | {"color": colour}
        middle.plot(list(values), list(values.values()), marker=".", label=label, **style)
        middle.axhline(values[best], color="0.6", linewidth=0.8, linestyle="--")
    if metrics:
        middle.legend(frameon=False, loc="lower right")
    right.plot(at[::thin], rates[::thin], **_STYLE)
    right.set_title("Learning rate")
    right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (left, middle, right):
        axes.set_xlabel(unit)
        axes.set_xlim(0, max(1, at[-1]) * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _short_name(metric: str) -> str:
    return metric.rpartition("/")[2].replace("_", " ")


def _span(values: np.ndarray, means: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, (0, 99.5))
    margin = 0.05 * (max(high, means.max()) - low) or 0.1
    return low - margin, max(high, means.max()) + margin


class PredictionsHook(Hook):
    """Draw images of the last evaluation with their predictions: predictions.png.

    The figure is drawn after training and after a test. A subclass per task selects the images
    and draws them.
    """

    priority = "LOW"

    def reset(self) -> None:
        """Forget the images of the previous evaluation."""
        raise NotImplementedError

    def keep(self, data_batch: Any, outputs: Any) -> None:
        """Keep the images of a batch, and the model's outputs, that will be drawn."""
        raise NotImplementedError

    def figure(self, metainfo: dict) -> Figure | None:
        """The figure of the images kept, given the data set's ``metainfo``; None if there are
        none."""
        raise NotImplementedError

    def before_val_epoch(self, runner: Any) -> None:
        self.reset()

    def before_test_epoch(self, runner: Any) -> None:
        self.reset()

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self.keep(data_batch, outputs)

    after_test_iter = after_val_iter

    def before_train(self, runner: Any) -> None:
        self.reset()

    def after_train(self, runner: Any) -> None:
        if runner.val_loop is not None:
            self._draw(runner, runner.val_dataloader.dataset)

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self._draw(runner, runner.test_dataloader.dataset)

    def _draw(self, runner: Any, dataset: Any) -> None:
        if not is_main_process():
            return
        figure = self.figure(getattr(dataset, "metainfo", {}))
        if figure is None:
            return
        path = Path(runner.work_dir, "predictions.png")
        figure.savefig(path, dpi=150)
        runner.logger.info(f"Predictions: {path}")
