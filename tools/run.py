"""Shared by `train` and `test`: mmengine's runner on this machine, and errors in one line."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, cast

import torch
import typer
from filelock import FileLock, Timeout
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import BaseLoop, EpochBasedTrainLoop

from linsight.backbones.checkpoint import CheckpointError
from linsight.data.augmentation import effective_settings
from linsight.data.loading import DataError
from linsight.heads.runner import SafeRunner
from linsight.tools.config import ConfigError, load_config
from linsight.tools.recipe import FILE
from linsight.tools.schedule import drop_empty_schedules, schedule_faults

Launcher = Literal["none", "pytorch", "slurm", "mpi"]

# The command-line parameters of `train` and `test` alike.
ConfigName = Annotated[str, typer.Argument(help="Name of one of linsight's configs, or a path.")]
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Further words after --cfg-options."),
]
WorkDir = Annotated[
    Path | None, typer.Option(help="Where the results go; default: work_dirs/<config>.")
]
LauncherOption = Annotated[
    Launcher, typer.Option(help="What started a distributed run; torchrun is recognised.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Change the config: a.b=1 c=2 ..."),
]

# Messages of mmengine, timm or torch about their internals, which a user cannot act on.
_NOT_FOR_USERS = (
    r".*no metainfo.*",
    r".*Exp name: .*",
    r"Saving checkpoint at .*",
    r"Checkpoints will be saved to .*",
    r"Distributed training is not used.*",
    r"Hooks will be executed.*",
    r"Auto resumed from the latest checkpoint None.*",
    r"Did not find last_checkpoint.*",
    r"The previous best checkpoint .*",
    r"Loads? checkpoint .*",
    r".*\"FileClient\" will be deprecated.*",
    r".*\"HardDiskBackend\" is the alias.*",
    r"Converting ground truth to coco format.*",
    r"\w+_mAP_copypaste: .*",
)

_MMENGINES = ("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint")


class QuietRunner(SafeRunner):
    """A runner that shows only messages about the run itself; the log file has all of them."""

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.addFilter(_concerns_user)
                handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
        return logger

    def dump_config(self) -> None:
        """Write the config into the work dir, unless that is where it was read from."""
        file = self.cfg.filename
        if not file or Path(file).resolve().parent != Path(self.work_dir).resolve():
            super().dump_config()

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        loop = super().build_train_loop(loop)
        if isinstance(loop, EpochBasedTrainLoop) and not len(loop.dataloader):
            loader = loop.dataloader
            count, drawn = (len(cast(Sized, each)) for each in (loader.dataset, loader.sampler))
            of_which = f" of which the sampler draws {drawn} in an epoch," if drawn < count else ""
            raise DataError(
                f"the training data set has {count} images,{of_which} too few for a batch: set "
                f"train_dataloader.batch_size, which is {loader.batch_size}, to that or less, or "
                f"train_dataloader.drop_last=False{', or another sampler' if of_which else ''}"
            )
        for fault in schedule_faults(self.cfg, cast(Any, loop).max_iters, len(loop.dataloader)):
            self.logger.warning(fault)
        self.param_schedulers = drop_empty_schedules(self.param_schedulers, len(loop.dataloader))
        return loop

    def load_or_resume(self) -> None:
        """Load the checkpoint, and say so if the training that it is of has nothing left to do."""
        super().load_or_resume()
        if not isinstance(self._train_loop, BaseLoop):
            return
        loop = cast(Any, self._train_loop)  # both kinds of training loops count
        if loop.iter >= loop.max_iters:
            done = f"{loop.epoch} epochs" if loop.max_epochs > 1 else f"{loop.iter} iterations"
            self.logger.warning(
                f"The training has done its {done}: a larger train_cfg.max_epochs or max_iters, or "
                "--epochs, goes on with it"
            )


def _concerns_user(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    # The environment, the config and the hooks come as one message of many lines.
    return "\n" not in text and not any(re.match(p, text) for p in _NOT_FOR_USERS)


def build_runner(
    config: str | Path,
    overrides: list[str],
    work_dir: Path | None,
    launcher: Launcher = "none",
    adapt: Callable[[Config], None] = lambda config: None,
) -> SafeRunner:
    """Read and check a config and build mmengine's runner from it, for this machine.

    Args:
        config: name or path.
        overrides: ``key=value`` words.
        work_dir: folder for the results; by default ``work_dirs/`` and the config's name, or that
            of its folder where `linsight train --data` has written it.
        launcher: what started the processes of a distributed run; torchrun is recognised.
        adapt: function that changes the config before the runner is built.

    Raises:
        ConfigError: the config is missing or wrong, or its data root does not exist.
    """
    cfg = load_config(config, overrides)
    _check_data_root(cfg)
    file = Path(cfg.filename)
    # All configs of users' data have one name; under it, one training would resume another's.
    name = file.resolve().parent.name if file.name == FILE else file.stem
    cfg.work_dir = str(work_dir or cfg.get("work_dir") or Path("work_dirs", name))
    if launcher == "none" and torch.distributed.is_torchelastic_launched():
        # Without it, each process would train alone, and write over the others' checkpoints.
        launcher = "pytorch"
    cfg.launcher = launcher
    if launcher == "pytorch" and not torch.cuda.is_available():
        # mmengine's own way of joining the processes asks for a GPU.
        torch.distributed.init_process_group("gloo")
    adapt(cfg)
    # The checkpoints keep these values, whatever timm's defaults will be.
    for split in ("train", "val", "test"):
        dataset = (cfg.get(f"{split}_dataloader") or {}).get("dataset", {})
        if cfg.model.type == "ImageClassifier" and "transform" in dataset:
            dataset.transform = effective_settings(dataset.transform)
    # mmengine understands None, "without this hook", only for its own default hooks.
    hooks = cfg.get("default_hooks", {})
    for name in [name for name, hook in hooks.items() if hook is None and name not in _MMENGINES]:
        del hooks[name]
    wrapper = cfg.get("optim_wrapper") or {}
    if wrapper.get("type") == "AmpOptimWrapper" and not torch.cuda.is_available():
        print("No GPU found: computing in float32 on the CPU", file=sys.stderr)
        wrapper["type"] = "OptimWrapper"
        wrapper.pop("loss_scale", None)
        wrapper.pop("dtype", None)
    return cast(QuietRunner, QuietRunner.from_cfg(cfg))


def _check_data_root(cfg: Config) -> None:
    """Check the folder of the data before the model's weights are downloaded.

    Raises:
        ConfigError: the folder ``data_root`` does not exist, and a data set reads from it.
    """
    root = str(cfg.get("data_root", "")).rstrip("/")
    loaders = [cfg.get(f"{split}_dataloader") or {} for split in ("train", "val", "test")]
    used = any(
        f"'{root}/" in str(loader) or f"'{root}'" in str(loader)
        for loader in loaders
        # timm's readers with a prefix, such as hfds/, make the folder for what they download.
        if "/" not in str(loader.get("dataset", {}).get("name", ""))
    )
    if root and used and "://" not in root and not Path(root).is_dir():
        raise ConfigError(
            f"the folder data_root {root!r} does not exist: "
            "--cfg-options data_root=/path/to/the/data"
        )


@contextmanager
def report_errors() -> Iterator[None]:
    """Print an error that a user can fix in one line, and exit with code 1.

    Such errors are about data, a file, or an argument that linsight refuses. An error in the
    program itself keeps its traceback.
    """
    warnings.filterwarnings("ignore", module=r"(mmengine|timm|torch)\b")
    # Figures have names of classes and files, in any writing.
    warnings.filterwarnings("ignore", message="Glyph .* missing from font")
    # Without this each line of the log becomes a traceback when the disk is full.
    logging.raiseExceptions = False
    try:
        yield
    except (ConfigError, DataError, CheckpointError) as error:
        _leave(error)
    except OSError as error:
        known = error.filename is not None and error.strerror
        _leave(OSError(f"{error.filename}: {error.strerror}") if known else error)
    except ValueError as error:
        if not _raised_by_linsight(error):
            raise
        _leave(error)
    except RuntimeError as error:
        sizes = re.findall(r"\[[\d, ]+\](?= at entry)", str(error))
        if "stack expects each tensor to be equal size" not in str(error) or not sizes:
            raise
        _leave(
            DataError(
                f"the images of a batch have the sizes {' and '.join(sizes)}: set the data "
                "loader's batch_size=1, or transforms that give all images one size"
            )
        )
    except TypeError as error:
        # The check of the config cannot see arguments that **kwargs takes.
        if "unexpected keyword argument" not in str(error):
            raise
        _leave(error)


@contextmanager
def report_stop() -> Iterator[None]:
    """Say in one line, after Ctrl-C, how a training goes on, and exit with code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nStopped. The same command with --resume goes on.", file=sys.stderr)
        raise SystemExit(130) from None


def _raised_by_linsight(error: Exception) -> bool:
    """Whether code of linsight raised the error, whose message then says what to change."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").startswith("linsight.")


def _leave(error: Exception) -> NoReturn:
    # The error of a data worker comes with a traceback, whose last line is the message.
    message = str(error).strip()
    if "DataLoader worker process" in message:
        message = message.splitlines()[-1].partition(": ")[2]
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1) from None


def lock_work_dir(work_dir: Path) -> ExitStack | FileLock:
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
