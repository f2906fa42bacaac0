"""Train the model of a config, `linsight train CONFIG`, or one for a user's data, `linsight train
--data PATH --model NAME`."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import typer
from mmengine.config import Config

from linsight.data.sources import read_source
from linsight.tools.check import TaskOption, check_task, draw_samples, inspect_data
from linsight.tools.config import ConfigError, _nearest
from linsight.tools.export import write_safetensors
from linsight.tools.model import open_model
from linsight.tools.recipe import FILE, Wishes, write_recipe
from linsight.tools.recipe_start import check_names
from linsight.tools.run import (
    LauncherOption,
    Overrides,
    Words,
    WorkDir,
    build_runner,
    lock_work_dir,
    report_errors,
    report_stop,
)
from linsight.tools.schedule import set_epochs

Tracker = Literal["tensorboard", "wandb", "mlflow"]
_BACKENDS = {
    "tensorboard": "TensorboardVisBackend",
    "wandb": "WandbVisBackend",
    "mlflow": "MLflowVisBackend",
}


def train(
    config: Annotated[
        str | None,
        typer.Argument(help="Name of one of linsight's configs, or a path; or give --data."),
    ] = None,
    words: Words = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Your data in place of a config: a folder for each class, COCO, YOLO, Pascal VOC, "
            "images and masks, a CSV file, hfds/NAME. The config for it is written to the work dir."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="For --data: see linsight models.")] = None,
    weights: Annotated[
        str, typer.Option(help="What --data starts from: pretrained, none, or a file.")
    ] = "pretrained",
    task: TaskOption = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="How many epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per device.")] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Learning rate.")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the images; of detection the shorter one.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of all random numbers.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that read data.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, or cuda:1; default: a GPU if there is one.")
    ] = None,
    frozen_stages: Annotated[
        int | None,
        typer.Option(
            "--freeze", min=0, help="Freeze the stem and this many stages; all: a linear probe."
        ),
    ] = None,
    layer_decay: Annotated[
        float | None, typer.Option(min=0, max=1, help="Rate of a layer over that of the next.")
    ] = None,
    class_weights: Annotated[
        bool, typer.Option("--class-weights", help="Weigh rare classes as much as frequent ones.")
    ] = False,
    patience: Annotated[
        int | None,
        typer.Option(min=0, help="Stop after as many validations without progress; 0: never."),
    ] = None,
    work_dir: WorkDir = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the last checkpoint in the work dir, or from the file named after it.",
        ),
    ] = False,
    teacher: Annotated[
        str | None,
        typer.Option(help="Distil a classifier's knowledge: a checkpoint, a folder, or a name."),
    ] = None,
    amp: Annotated[bool, typer.Option("--amp", help="Mixed precision; needs a GPU.")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the backbone.")] = False,
    tracker: Annotated[
        Tracker | None, typer.Option(help="Where the curves are logged as well.")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="--tracker tensorboard.")] = (
        False
    ),
    launcher: LauncherOption = "none",
    cfg_options: Overrides = None,
) -> None:
    """Train; weights, logs and figures go to the work dir."""
    options = dict(locals())
    with report_stop(), report_errors():
        run(**options)


def _set_teacher(cfg: Config, source: str) -> None:
    """Let a classifier learn from a teacher as well, whose copy is written to the work dir.

    Raises:
        ConfigError: the config is not of a classifier.
    """
    if cfg.model.type != "ImageClassifier":
        raise ConfigError("--teacher is for classifiers, and the config is of another model")
    folder = Path(cfg.work_dir, "teacher").resolve()
    write_safetensors(open_model(source), folder)
    teacher = {"model_name": f"local-dir:{folder}", "pretrained": True}
    cfg.model.distillation = {**(cfg.model.get("distillation") or {}), "teacher": teacher}


def run(**options: Any) -> Path:
    """Train, with the options of :func:`train` by their names.

    Returns:
        The checkpoint that validated best, or else the last one.

    Raises:
        TypeError: there is no such option.
        ConfigError: an option or the config is wrong.
        DataError: the data are wrong.
    """
    known = inspect.signature(train).parameters
    for name in options.keys() - known.keys():
        raise TypeError(f"train takes no option {name!r}{_nearest(name, known)}")
    given = SimpleNamespace(**{name: known[name].default for name in known} | options)
    words, config = list(given.words or []), given.config
    if config is not None and (given.data is not None or "=" in str(config)):
        if not given.resume and "=" not in str(config):
            raise ConfigError(
                f"{config} stands beside --data, which takes no config: --model names a model"
            )
        # What stands for a config is then a word that follows --resume or changes the config.
        words.insert(0, str(config))
        config = None
    # OpenMMLab writes `--resume [CKPT]`: the checkpoint is the word that is no KEY=VALUE.
    checkpoints = [word for word in words if given.resume and "=" not in word]
    overrides = [*(given.cfg_options or []), *(word for word in words if word not in checkpoints)]
    work_dir = given.work_dir and Path(given.work_dir)
    tracker = given.tracker or ("tensorboard" if given.tensorboard else None)
    if tracker and find_spec(tracker) is None:
        raise ConfigError(f"--tracker {tracker} needs its package: pip install {tracker}")

    def adapt(cfg: Config) -> None:
        locks.enter_context(lock_work_dir(Path(cfg.work_dir)))
        cfg.resume = given.resume or cfg.get("resume", False)
        if checkpoints:
            cfg.load_from = checkpoints[-1]
        elif given.resume and not Path(cfg.work_dir, "last_checkpoint").is_file():
            print(f"Nothing to resume in {cfg.work_dir}: the training starts", file=sys.stderr)
        if given.teacher is not None:
            _set_teacher(cfg, given.teacher)
        if given.amp and cfg.optim_wrapper.get("type") != "AmpOptimWrapper":
            cfg.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
        if given.compile:
            # Of detectors only the backbone compiles; the work after it depends on the objects.
            whole = cfg.model.type in ("ImageClassifier", "SemanticSegmentor")
            part = cfg.model if whole else cfg.model.backbone
            part.compile = True
        if tracker:
            backends = [{"type": "LocalVisBackend"}, {"type": _BACKENDS[tracker]}]
            cfg.visualizer = {"type": "Visualizer", "vis_backends": backends}
        if given.data is None or given.resume:  # the config of what is resumed is not written anew
            _apply(cfg, given)

    names = [field.name for field in fields(Wishes)]
    values = {name: getattr(given, name) for name in names}
    wishes = Wishes(**values | {"seed": given.seed or 0, "weights": str(given.weights)})
    with ExitStack() as locks:
        _choose_device(given.device)
        if given.data is not None:
            data = str(given.data)
            name = f"{Path(data).resolve().stem}_{given.model or 'tuned'}"
            work_dir = work_dir or Path("work_dirs", name)
            config = str(_config_for(data, given.task, wishes, work_dir, given.resume, overrides))
        elif config is None:
            raise ConfigError(
                "name a config (linsight configs), or your data: --data PATH --model NAME"
            )
        else:
            _refuse_without_data(wishes, given.task)
        runner = build_runner(config, overrides, work_dir, given.launcher, adapt)
        runner.train()
    written = sorted(Path(runner.work_dir).glob("*.pth"), key=lambda file: file.stat().st_mtime)
    best = [file for file in written if file.name.startswith("best_")]
    return (best or written or [Path(runner.work_dir)])[-1]


def _refuse_without_data(wishes: Wishes, task: str | None) -> None:
    """Refuse options that a config already answers."""
    given = {
        "--model": (wishes.model, "model.backbone.model_name=NAME"),
        "--weights": (wishes.weights != "pretrained", "load_from=FILE"),
        "--task": (task, "another config"),
        "--image-size": (wishes.image_size, "the transforms of the data loaders"),
        "--freeze": (wishes.frozen_stages is not None, "model.backbone.frozen_stages=N"),
        "--layer-decay": (wishes.layer_decay, "optim_wrapper.optimizer.layer_decay=0.75"),
        "--class-weights": (wishes.class_weights, "model.loss"),
        "--patience": (wishes.patience is not None, "default_hooks.early_stopping.patience=N"),
    }
    for option, (value, instead) in given.items():
        if value:
            raise ConfigError(f"{option} goes with --data; of a config change {instead}")


def _config_for(
    data: str,
    task: str | None,
    wishes: Wishes,
    work_dir: Path,
    resume: bool,
    overrides: Sequence[str],
) -> Path:
    """The config for a user's data, written to the work dir; of a training that is resumed it is
    the one that is there."""
    file = work_dir / FILE
    if resume and file.is_file():
        return file
    if any(work_dir.glob("*.pth")):
        raise ConfigError(
            f"the work dir {work_dir} holds a training: --resume goes on with it, and --work-dir "
            "names another folder"
        )
    check_names(wishes.model, wishes.weights)
    # With several processes each reads the data, and the first one writes.
    source = read_source(data, check_task(task), wishes.seed)
    report = inspect_data(source)
    with lock_work_dir(work_dir):
        file = write_recipe(source, report, wishes, work_dir, overrides)
        if source.splits:
            draw_samples(source, report, work_dir / "samples.png")
    print(file.read_text(encoding="utf-8"))
    print(f"This config is {file}; samples of the data with their labels: {work_dir}/samples.png")
    return file


def _choose_device(name: str | None) -> None:
    """Hide all devices but one; mmengine takes the first GPU that it sees.

    Raises:
        ConfigError: there is no such device.
    """
    if name is None:
        return
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise ConfigError(f"--device is {name!r}, expected such as cpu or cuda:1")
    if kind == "cuda":
        import torch

        if int(number or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"--device is {name!r}, and torch finds {torch.cuda.device_count()} GPUs"
            )
    os.environ["CUDA_VISIBLE_DEVICES"] = number or "0" if kind == "cuda" else ""


def _apply(cfg: Config, given: Any) -> None:
    """Change the config by the plain options."""
    if given.epochs is not None:
        set_epochs(cfg, given.epochs)
    if given.batch_size is not None:
        cfg.train_dataloader.batch_size = given.batch_size
    if given.lr is not None:
        cfg.optim_wrapper.optimizer.lr = given.lr
    if given.seed is not None:
        cfg.randomness = {**cfg.get("randomness", {}), "seed": given.seed}
    if given.workers is not None:
        for split in ("train", "val", "test"):
            if loader := cfg.get(f"{split}_dataloader"):
                loader.num_workers = given.workers
                if not given.workers:
                    loader.persistent_workers = False


if __name__ == "__main__":
    typer.run(train)
