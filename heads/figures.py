"""The two figures a run leaves in its work_dir: how it learned, and what it sees now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

_STYLE = {"color": "#2166ac", "linewidth": 1.8}
_WRONG = "#c0392b"


@HOOKS.register_module()
class LearningCurveHook(Hook):
    """Draw loss, validation metric and learning rate over the epochs: learning_curve.png.

    Args:
        metric: the validation metric to draw.
    """

    priority = "LOW"

    def __init__(self, metric: str = "accuracy/top1") -> None:
        self.metric = metric

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        # In the message hub, so that the checkpoint carries it through a resume.
        history = runner.message_hub.get_info("history", {})
        history[runner.epoch] = dict(metrics or {})
        runner.message_hub.update_info("history", history)

    def after_train(self, runner: Any) -> None:
        if not is_main_process():
            return
        hub = runner.message_hub
        if "train/loss" not in hub.log_scalars:
            return
        history = hub.get_info("history", {})
        path = Path(runner.work_dir, "learning_curve.png")
        draw_learning_curve(
            hub.get_scalar("train/loss").data[0],
            hub.get_scalar("train/lr").data[0],
            {epoch: m[self.metric] for epoch, m in history.items() if self.metric in m},
            len(runner.train_dataloader),
            self.metric,
        ).savefig(path, dpi=150)
        runner.logger.info(f"Learning curve: {path}")


def draw_learning_curve(
    losses: np.ndarray,
    rates: np.ndarray,
    metric: dict[int, float],
    epoch_length: int,
    name: str,
) -> Figure:
    """Three panels over the epochs.

    Args:
        losses: training loss of each iteration.
        rates: learning rate of each iteration.
        metric: validation metric by epoch.
        epoch_length: iterations an epoch.
        name: of the metric.
    """
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    epochs = np.arange(1, len(losses) + 1) / epoch_length
    whole = len(losses) // epoch_length * epoch_length
    thin = max(1, len(losses) // 2000)

    left.plot(epochs[::thin], losses[::thin], color="#9ec5e8", linewidth=0.7)
    if whole:
        means = losses[:whole].reshape(-1, epoch_length).mean(1)
        left.plot(np.arange(1, len(means) + 1), means, marker=".", label="mean of epoch", **_STYLE)
        left.legend(frameon=False)
        # The first iterations of a training would flatten the rest.
        left.set_ylim(*_span(losses, means))
    left.set_title("Training loss")

    middle.set_title(f"Validation {name.replace('/', ' ')} (%)")
    if metric:
        middle.plot(list(metric), list(metric.values()), marker=".", **_STYLE)
        best = max(metric, key=metric.get)
        middle.axhline(metric[best], color="0.6", linewidth=0.8, linestyle="--")
        text = f"best: {metric[best]:.2f} in epoch {best}"
        middle.text(0.98, 0.04, text, transform=middle.transAxes, ha="right")
    right.plot(epochs[::thin], rates[::thin], **_STYLE)
    right.set_title("Learning rate")
    right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (left, middle, right):
        axes.set_xlabel("epoch")
        axes.set_xlim(0, max(1, epochs[-1]) * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _span(values: np.ndarray, means: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, (0, 99.5))
    margin = 0.05 * (max(high, means.max()) - low) or 0.1
    return low - margin, max(high, means.max()) + margin


@HOOKS.register_module()
class PredictionsHook(Hook):
    """Draw evaluated images with their predicted label, the wrong ones marked:
    predictions.png, after training and after a test.

    The images are those of the last evaluation: the first ones it got right, and in the last
    row the first ones it got wrong.

    Args:
        rows: of the grid.
        columns: of the grid.
    """

    priority = "LOW"

    def __init__(self, rows: int = 4, columns: int = 8) -> None:
        self.rows = rows
        self.columns = columns
        self._reset()

    def _reset(self) -> None:
        self.right: list[tuple] = []
        self.wrong: list[tuple] = []
        self.seen = self.errors = 0

    def before_val_epoch(self, runner: Any) -> None:
        self._reset()

    def before_test_epoch(self, runner: Any) -> None:
        self._reset()

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        images, labels = data_batch
        predicted = torch.stack([output["scores"] for output in outputs]).argmax(1).cpu()
        for image, label, guess in zip(images, labels.tolist(), predicted.tolist(), strict=True):
            self.seen += 1
            self.errors += guess != label
            kept = self.right if guess == label else self.wrong
            if len(kept) < self.rows * self.columns:
                kept.append((image.cpu(), label, guess))

    after_test_iter = after_val_iter

    def after_train(self, runner: Any) -> None:
        if self.seen:
            self._draw(runner, runner.val_dataloader.dataset)

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self._draw(runner, runner.test_dataloader.dataset)

    def _draw(self, runner: Any, dataset: Any) -> None:
        if not is_main_process():
            return
        room = self.rows * self.columns
        # At least the last row for the wrong ones, more where there are few right ones.
        right = self.right[: room - self.columns * bool(self.wrong)]
        rows = -(-len(right) // self.columns)
        wrong = self.wrong[: room - rows * self.columns]
        path = Path(runner.work_dir, "predictions.png")
        draw_predictions(
            right,
            wrong,
            getattr(dataset, "metainfo", {}),
            self.columns,
            f"{self.seen - self.errors:,} of {self.seen:,} images right "
            f"({1 - self.errors / self.seen:.2%})"
            + (f"; marked: {len(wrong)} of the {self.errors:,} wrong" if wrong else ""),
        ).savefig(path, dpi=150)
        runner.logger.info(f"Predictions: {path}")


def draw_predictions(
    right: list[tuple], wrong: list[tuple], metainfo: dict, columns: int, title: str
) -> Figure:
    """A grid of images, each under its predicted label.

    Args:
        right: (normalised image (3, H, W), label, predicted label) of each.
        wrong: the same; drawn framed, on rows of their own.
        metainfo: ``classes``, ``mean`` and ``std`` of the data set, as far as known.
        columns: of the grid.
        title: over the grid.
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
