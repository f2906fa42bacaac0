"""Hooks of a training run."""

import logging
import re
from types import SimpleNamespace

import pytest
import timm
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS, PARAM_SCHEDULERS
from mmengine.runner import EpochBasedTrainLoop

import linsight.heads  # noqa: F401  registers the hooks
from linsight.backbones.norms import PRepBN
from linsight.heads.checkpoint import read_checkpoint
from linsight.heads.runner import SafeRunner


def test_norms_move_with_the_iterations():
    """However often a norm runs in an iteration, as recomputation runs it twice."""
    model = timm.create_model("rala_vit_nano", norm_layer="prepbn", num_classes=3)
    model.set_grad_checkpointing()
    norms = [part for part in model.modules() if isinstance(part, PRepBN)]
    hook = HOOKS.build({"type": "NormProgressHook", "iterations": 4})
    seen = []
    # A run that was resumed after its first iteration.
    for iteration in range(1, 7):
        runner = SimpleNamespace(model=model, iter=iteration)
        hook.before_train_iter(runner, batch_idx=iteration)
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        (progress,) = {norm.progress.item() for norm in norms}
        seen.append(progress)
    assert seen == [0.25, 0.5, 0.75, 1, 1, 1]


def test_a_transition_takes_iterations():
    with pytest.raises(ValueError, match="iterations is 0"):
        HOOKS.build({"type": "NormProgressHook", "iterations": 0})


SCHEDULES = {
    "Constant": {},
    "CosineAnnealing": {"T_max": 10},
    "CosineRestart": {"periods": [3, 3, 6], "restart_weights": [1, 0.5, 0.5], "eta_min": 0.0},
    "Exponential": {"gamma": 0.9},
    "Linear": {},
    "MultiStep": {"milestones": [2, 7]},
    "OneCycle": {"eta_max": 1.0, "total_steps": 12},
    "Poly": {},
    "ReduceOnPlateau": {"monitor": "m", "patience": 0},
    "Step": {"step_size": 2},
}


@pytest.mark.parametrize("name", sorted(PARAM_SCHEDULERS.module_dict))
def test_each_schedule_goes_on_from_its_checkpoint(name, tmp_path):
    kind = name.removesuffix("ParamScheduler").removesuffix("LR").removesuffix("Momentum")
    options = {"param_name": "lr"} if name.endswith("ParamScheduler") else {}

    def build():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
        settings = {"type": name, "optimizer": optimizer, **SCHEDULES[kind], **options}
        return optimizer, PARAM_SCHEDULERS.build(settings)

    def step(schedule, number):
        schedule.step(*([{"m": number % 4}] if kind == "ReduceOnPlateau" else []))

    optimizer, schedule = build()
    optimizer.step()
    for number in range(5):
        step(schedule, number)
    path = tmp_path / "epoch_5.pth"
    state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save({"state_dict": {"weight": torch.zeros(1)}, **state}, path)
    resumed_optimizer, resumed = build()
    resumed_optimizer.step()
    content = read_checkpoint(path)
    resumed_optimizer.load_state_dict(content["optimizer"])
    resumed.load_state_dict(content["schedule"])
    for number in range(5, 11):
        step(schedule, number)
        step(resumed, number)
        for group, other in zip(
            optimizer.param_groups, resumed_optimizer.param_groups, strict=True
        ):
            assert (group["lr"], group["momentum"]) == (other["lr"], other["momentum"])


class Line(BaseModel):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, mode="tensor"):
        loss = ((self.weight * torch.tensor(x) - 2) ** 2).mean()
        return {"loss": loss} if mode == "loss" else [{"score": self.weight.item()}]


class Rounded(BaseMetric):
    """A score that stands still for a while."""

    def process(self, data_batch, data_samples):
        self.results += [sample["score"] for sample in data_samples]

    def compute_metrics(self, results):
        return {"score": round(4 * sum(results) / len(results))}


class Constant(Rounded):
    """A score that is given."""

    def __init__(self, score):
        super().__init__()
        self.score = score

    def compute_metrics(self, results):
        return {"score": self.score}


class Stop(Hook):
    def __init__(self, epoch):
        self.epoch = epoch

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if (runner.epoch, batch_idx) == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("cycle", "by_epoch"),
    [
        ({"val_interval": 1}, True),
        ({"val_interval": 2, "dynamic_intervals": [(3, 1)]}, True),
        ({"val_interval": 1}, False),
    ],
    ids=["each epoch", "dynamic intervals", "from the middle of an epoch"],
)
def test_validations_count_once_over_a_kill(request, tmp_path, cycle, by_epoch):
    """Schedules, early stopping and the best score depend on validations. A checkpoint from the
    middle of an epoch has counted the validation before it already."""

    def train(folder, stop=None, resume=False):
        data = {"dataset": [{"x": float(i)} for i in range(4)], "batch_size": 2, "num_workers": 0}
        loader = {**data, "sampler": {"type": "DefaultSampler", "shuffle": False}}
        runner = SafeRunner(
            Line(),
            str(tmp_path / folder),
            train_dataloader=loader,
            val_dataloader=loader,
            train_cfg={"by_epoch": True, "max_epochs": 5, **cycle},
            val_cfg={},
            val_evaluator=Evaluator([Rounded()]),
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01}},
            param_scheduler={
                "type": "ReduceOnPlateauLR",
                "monitor": "score",
                "rule": "less",
                "patience": 1,
            },
            default_hooks={
                "checkpoint": {
                    "type": "SafeCheckpointHook",
                    "save_best": "score",
                    "rule": "less",
                    "interval": 1 if by_epoch else 3,
                    "by_epoch": by_epoch,
                },
                "checked_load": {"type": "CheckedLoadHook"},
                "resume_validation": {"type": "ResumeValidationHook"},
            },
            custom_hooks=[
                {"type": "EarlyStoppingHook", "monitor": "score", "rule": "less", "patience": 9},
                {"type": "EMAHook"},
                Stop(stop),
            ],
            resume=resume,
            randomness={"seed": 0},
            # mmengine keeps one log writer per experiment name in a process.
            experiment_name=f"{request.node.name}_{folder}_{resume}",
        )
        try:
            runner.train()
        except KeyboardInterrupt:
            return None
        return runner

    def validations(runner):
        (stopping,) = (hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook))
        (schedule,) = runner.param_schedulers
        counted = {"best": stopping.best_score, "waited": stopping.wait_count}
        names = ("last_step", "best", "num_bad_epochs", "cooldown_counter")
        return counted | {f"schedule.{name}": getattr(schedule, name) for name in names}

    unbroken = train("unbroken")
    train("killed", stop=(3, 1))
    resumed = train("killed", resume=True)
    assert validations(resumed) == validations(unbroken)
    best = [runner.message_hub.get_info("best_score") for runner in (resumed, unbroken)]
    assert best[0] == best[1]
    if by_epoch:
        assert resumed.optim_wrapper.get_lr() == unbroken.optim_wrapper.get_lr()
        assert resumed.model.weight == unbroken.model.weight


def test_another_trainings_best_checkpoint_is_left_alone(tmp_path):
    """Resumed into another folder, a training removes no file of the one that it goes on from."""

    def train(folder, epochs, source=None):
        data = {"dataset": [{"x": float(i)} for i in range(4)], "batch_size": 2, "num_workers": 0}
        loader = {**data, "sampler": {"type": "DefaultSampler", "shuffle": False}}
        hook = {"type": "SafeCheckpointHook", "save_best": "score", "rule": "greater"}
        SafeRunner(
            Line(),
            str(tmp_path / folder),
            train_dataloader=loader,
            val_dataloader=loader,
            train_cfg={"by_epoch": True, "max_epochs": epochs},
            val_cfg={},
            val_evaluator=Evaluator([Constant(epochs)]),
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01}},
            default_hooks={"checkpoint": hook},
            load_from=source and str(source),
            resume=source is not None,
            randomness={"seed": 0},
            experiment_name=f"best_{folder}_{epochs}",
        ).train()
        return sorted(path.name for path in (tmp_path / folder).glob("best_*"))

    assert train("one", 1) == ["best_score_epoch_1.pth"]
    assert train("two", 2, tmp_path / "one" / "epoch_1.pth") == ["best_score_epoch_2.pth"]
    assert train("two", 3, tmp_path / "two" / "epoch_2.pth") == ["best_score_epoch_3.pth"]
    assert (tmp_path / "one" / "best_score_epoch_1.pth").is_file()


class Noisy(Line):
    def forward(self, x, mode="tensor"):
        return super().forward(torch.tensor(x) + torch.rand(()), mode)


def test_a_run_of_iterations_draws_the_same_over_a_kill(tmp_path):
    """As the layers drop paths, and Mixup and Dropout draw; validations draw seeds between."""

    def train(folder, stop=None, resume=False):
        data = {"dataset": [{"x": float(i)} for i in range(4)], "batch_size": 2, "num_workers": 0}
        runner = SafeRunner(
            Noisy(),
            str(tmp_path / folder),
            train_dataloader={**data, "sampler": {"type": "InfiniteSampler"}},
            val_dataloader={**data, "sampler": {"type": "DefaultSampler", "shuffle": False}},
            train_cfg={"by_epoch": False, "max_iters": 6, "val_interval": 2},
            val_cfg={},
            val_evaluator=Evaluator([Rounded()]),
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01}},
            default_hooks={
                "checkpoint": {"type": "SafeCheckpointHook", "interval": 2, "by_epoch": False},
                "resume_validation": {"type": "ResumeValidationHook"},
            },
            custom_hooks=[{"type": "EpochSeedHook"}, Stop(stop)],
            resume=resume,
            randomness={"seed": 0},
            experiment_name=f"iterations_{folder}_{resume}",
        )
        try:
            runner.train()
        except KeyboardInterrupt:
            return None
        return runner.model.weight

    unbroken = train("unbroken")
    train("killed", stop=(0, 3))
    assert train("killed", resume=True) == unbroken


@pytest.mark.parametrize("columns", [80, 100])
def test_the_bar_shows_step_and_times_on_any_terminal(monkeypatch, columns):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    metrics = {"coco/bbox_mAP": 0.123, "coco/segm_mAP": 0.1134}
    hook = HOOKS.build({"type": "ProgressBarHook", "metrics": list(metrics), "interval": 1})
    runner = SimpleNamespace(
        iter=1233, epoch=11, max_iters=14784, max_epochs=12, logger=logging.getLogger("bar")
    )
    runner.train_loop = object.__new__(EpochBasedTrainLoop)
    hook.before_train(runner)
    try:
        hook.after_train_iter(runner, 0, outputs={"loss": torch.tensor(1.25)})
        hook.after_val_epoch(runner, metrics)
        console = hook.progress.console
        with console.capture() as capture:
            console.print(hook.progress.get_renderable())
    finally:
        hook.close()
    line = re.sub(r"\x1b\[[0-9;]*[mK]|\r", "", capture.get()).splitlines()[0]
    assert len(line) <= columns
    for part in ("epoch 12/12", " 1234/14784 ", "0:00:00 left -:--:--", "loss 1.250", "bbox_mAP"):
        assert part in line


class Slow(BaseModel):
    """A model whose losses are one memory, which each iteration overwrites."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.register_buffer("losses", torch.zeros(2))

    def forward(self, inputs, data_samples=None, mode="loss"):
        return {"loss_a": (self.weight * torch.stack(inputs).mean()).sum(), "count": 3.0}

    def parse_losses(self, losses):
        total, names = super().parse_losses({"loss_a": losses["loss_a"]})
        with torch.no_grad():
            self.losses.copy_(torch.stack(list(names.values())))
        seen = {name: self.losses[place] for place, name in enumerate(names)}
        return total, {**seen, "count": losses["count"]}


class Reader(Hook):
    """What stands in the message hub after each iteration."""

    priority = "VERY_LOW"

    def __init__(self):
        self.seen, self.grown = [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        scalars = runner.message_hub.log_scalars
        length = [len(scalars[k].data[0]) for k in LOSSES if k in scalars]
        self.seen.append(length[0] if length else 0)
        self.grown.append(len(set(length)) < 2)


LOSSES = ("train/grad_norm", "train/loss_a", "train/loss", "train/count")


def _record_losses(tmp_path, runtime_info, by_epoch=True, **default_hooks):
    data = [{"inputs": torch.full((), float(i))} for i in range(1, 9)]
    reader = Reader()
    loop = {"by_epoch": True, "max_epochs": 2} if by_epoch else {"by_epoch": False, "max_iters": 8}
    runner = SafeRunner(
        Slow(),
        str(tmp_path / runtime_info / str(by_epoch)),
        train_dataloader={
            "dataset": data,
            "batch_size": 1,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
        },
        train_cfg=loop,
        optim_wrapper={
            "optimizer": {"type": "SGD", "lr": 0.1},
            "clip_grad": {"max_norm": 1.0},
        },
        default_hooks={
            "runtime_info": {"type": runtime_info},
            "checkpoint": {"type": "CheckpointHook", "interval": -1},
            **default_hooks,
        },
        custom_hooks=[reader],
        experiment_name=f"losses_{tmp_path.name}_{runtime_info}_{by_epoch}_{len(default_hooks)}",
    )
    runner.train()
    scalars = runner.message_hub.log_scalars
    return {name: scalars[name].data[0].tolist() for name in LOSSES}, reader


@pytest.mark.parametrize("by_epoch", [True, False])
def test_losses_are_those_of_mmengine(by_epoch, tmp_path):
    logger = {"logger": {"type": "LoggerHook", "interval": 3}}
    theirs, _ = _record_losses(tmp_path, "RuntimeInfoHook", by_epoch, **logger)
    ours, reader = _record_losses(tmp_path, "AsyncRuntimeInfoHook", by_epoch, **logger)
    assert ours == theirs
    assert len(set(ours["train/loss"])) == len(ours["train/loss"]) == (16 if by_epoch else 8)
    assert all(reader.grown)
    # Two behind, but where the logger prints, at the end of an epoch, and at the end.
    assert reader.seen[:8] == [0, 0, 3, 3, 3, 6, 6, 8]


def test_a_checkpoint_has_the_losses_until_then(tmp_path):
    hooks = {
        "logger": {"type": "LoggerHook", "interval": 100},
        "checkpoint": {"type": "CheckpointHook", "interval": 5, "by_epoch": False},
    }
    _, reader = _record_losses(tmp_path, "AsyncRuntimeInfoHook", False, **hooks)
    assert reader.seen == [0, 0, 1, 2, 5, 5, 5, 8]
    (path,) = tmp_path.rglob("iter_5.pth")
    content = read_checkpoint(path)
    assert len(content["message_hub"]["log_scalars"]["train/loss"].data[0]) == 5


def test_a_run_reads_its_losses_later(tmp_path):
    """Also one whose config names no hook for them."""
    runner = SafeRunner(Slow(), str(tmp_path), experiment_name=f"default_hooks_{tmp_path.name}")
    names = [type(hook).__name__ for hook in runner.hooks]
    assert "AsyncRuntimeInfoHook" in names
    assert "RuntimeInfoHook" not in names
