"""Train the model of a config, `linsight train CONFIG`, or one for a user's data, `linsight train
--data PATH --model NAME`."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import typer
from filelock import FileLock, Timeout
from mmengine.config import Config

from linsight.tools.check import TaskOption, check_task, draw_samples, inspect
from linsight.tools.config import ConfigError
from linsight.tools.recipe import FILE, Wishes, write_recipe
from linsight.tools.run import (
    LauncherOption,
    Overrides,
    Words,
    WorkDir,
    build_runner,
    report_errors,
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
    freeze: Annotated[
        int | None,
        typer.Option(min=0, help="Freeze the stem and this many stages; all: a linear probe."),
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
    words = list(words or [])
    if config is not None and (data is not None or "=" in config):
        # What stands for a config is then a word that follows --resume or changes the config.
        words.insert(0, config)
        config = None
    # OpenMMLab writes `--resume [CKPT]`: the checkpoint is the word that is no KEY=VALUE.
    checkpoints = [word for word in words if resume and "=" not in word]
    overrides = [*(cfg_options or []), *(word for word in words if word not in checkpoints)]

    def adapt(cfg: Config) -> None:
        locks.enter_context(_lock(Path(cfg.work_dir)))
        cfg.resume = resume or cfg.get("resume", False)
        if checkpoints:
            cfg.load_from = checkpoints[-1]
        elif resume and not Path(cfg.work_dir, "last_checkpoint").is_file():
            print(f"Nothing to resume in {cfg.work_dir}: the training starts", file=sys.stderr)
        if amp and cfg.optim_wrapper.get("type") != "AmpOptimWrapper":
            cfg.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
        if compile:
            # Of detectors only the backbone compiles; the work after it depends on the objects.
            whole = cfg.model.type in ("ImageClassifier", "SemanticSegmentor")
            part = cfg.model if whole else cfg.model.backbone
            part.compile = True
        if chosen := tracker or ("tensorboard" if tensorboard else None):
            backends = [{"type": "LocalVisBackend"}, {"type": _BACKENDS[chosen]}]
            cfg.visualizer = {"type": "Visualizer", "vis_backends": backends}
        if not written:
            _apply(cfg, epochs, batch_size, lr, seed, workers)

    with report_errors(), ExitStack() as locks:
        _choose_device(device)
        wishes = Wishes(
            model,
            weights,
            epochs,
            batch_size,
            lr,
            image_size,
            seed or 0,
            workers,
            freeze,
            layer_decay,
            class_weights,
            patience,
        )
        written = data is not None
        if data is not None:
            work_dir = work_dir or Path("work_dirs", f"{Path(data).stem}_{model or 'tuned'}")
            config = str(_config_for(data, task, wishes, work_dir, resume))
        elif config is None:
            raise ConfigError(
                "name a config (linsight configs), or your data: --data PATH --model NAME"
            )
        else:
            _refuse_without_data(wishes, task)
        build_runner(config, overrides, work_dir, launcher, adapt).train()


def _refuse_without_data(wishes: Wishes, task: str | None) -> None:
    """Refuse options that a config already answers."""
    given = {
        "--model": (wishes.model, "model.backbone.model_name=NAME"),
        "--weights": (wishes.weights != "pretrained", "load_from=FILE"),
        "--task": (task, "another config"),
        "--image-size": (wishes.image_size, "the transforms of the data loaders"),
        "--freeze": (wishes.frozen_stages is not None, "model.backbone.frozen_stages=N"),
        "--layer-decay": (wishes.layer_decay, "optim_wrapper.optimizer.layer_decay=0.75"),
        "--class-weights": (wishes.class_weights, "model.class_weight=[...]"),
        "--patience": (wishes.patience is not None, "default_hooks.early_stopping.patience=N"),
    }
    for option, (value, instead) in given.items():
        if value:
            raise ConfigError(f"{option} goes with --data; of a config change {instead}")


def _config_for(data: str, task: str | None, wishes: Wishes, work_dir: Path, resume: bool) -> Path:
    """The config for a user's data, written to the work dir; of a training that is resumed it is
    the one that is there."""
    from linsight.data.sources import read_source

    file = work_dir / FILE
    if resume and file.is_file():
        return file
    if any(work_dir.glob("*.pth")):
        raise ConfigError(
            f"the work dir {work_dir} holds a training: --resume goes on with it, and --work-dir "
            "names another folder"
        )
    # With several processes each reads the data, and the first one writes.
    source = read_source(data, check_task(task), wishes.seed)
    report = inspect(source)
    with _lock(work_dir):
        file = write_recipe(source, report, wishes, work_dir)
        if source.splits:
            draw_samples(source, work_dir / "samples.png")
    print(file.read_text(encoding="utf-8"))
    print(f"This config is {file}; samples of the data with their labels: {work_dir}/samples.png")
    return file


def _lock(work_dir: Path) -> ExitStack | FileLock:
    """A lock on a work dir against a second training; the system releases it when this process
    ends, however it ends.

    Raises:
        ConfigError: another training has it, or the folder cannot be written.
    """
    if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))):
        return ExitStack()  # the first of several processes holds it for all
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(work_dir / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"another training writes to the work dir {work_dir}: end it, or give another "
            "--work-dir"
        ) from None
    except FileExistsError:
        raise
    except OSError as error:
        raise ConfigError(f"the work dir {work_dir} cannot be written: {error.strerror}") from None
    held = ExitStack()
    held.callback(lock.release)
    return held


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


def _apply(
    cfg: Config,
    epochs: int | None,
    batch_size: int | None,
    lr: float | None,
    seed: int | None,
    workers: int | None,
) -> None:
    """Change the config by the plain options."""
    if epochs is not None:
        set_epochs(cfg, epochs)
    if batch_size is not None:
        cfg.train_dataloader.batch_size = batch_size
    if lr is not None:
        cfg.optim_wrapper.optimizer.lr = lr
    if seed is not None:
        cfg.randomness = {**cfg.get("randomness", {}), "seed": seed}
    if workers is not None:
        for split in ("train", "val", "test"):
            if loader := cfg.get(f"{split}_dataloader"):
                loader.num_workers = workers
                if not workers:
                    loader.persistent_workers = False


if __name__ == "__main__":
    typer.run(train)
