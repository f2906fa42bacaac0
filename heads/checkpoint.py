"""Checkpoints that survive: written whole or not at all, read without running code."""

from __future__ import annotations

import argparse
import codecs
import datetime
import io
import os
import pathlib
import pickle
import pickletools
import shutil
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from mmengine.dist import all_gather_object, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import is_model_wrapper
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.registry import HOOKS
from mmengine.runner import find_latest_checkpoint
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from linsight.backbones.checkpoint import (
    AVERAGED,
    CheckpointError,
    check_fit,
    clean_names,
    is_raw,
    unwrap,
)

from ..data.loading import some
from .sharding import REST, is_sharded, local, read_shards


class AtomicLocalBackend(LocalBackend):
    """mmengine's local files, each replaced in one step: ``backend_args=dict(backend="atomic")``.

    A reader finds the old content or the new, and never a part of it, even after a crash or on a
    full disk.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        # All attempts use one name, so that the next one overwrites what a killed one left.
        beside = path.with_name(f".{path.name}.part")
        try:
            with open(beside, "wb") as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            # A sharded training that was killed has left it; this one has whole models.
            if is_sharded(path):
                shutil.rmtree(path)
            os.replace(beside, path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise CheckpointError(
                f"cannot write {path}: {error.strerror}; what was there before is untouched"
            ) from error
        # The new name is on disk only after its folder is synchronised too.
        if hasattr(os, "O_DIRECTORY"):
            folder = os.open(path.parent, os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        self.put(obj.encode(encoding), filepath)


register_backend("atomic", AtomicLocalBackend)


_METHODS = {
    HistoryBuffer: ("min", "max", "mean", "current"),
    OneCycleParamScheduler: ("_annealing_cos", "_annealing_linear"),
}


def _method_of_mmengine(owner: type, name: str) -> Any:
    """A `getattr` for the methods to which mmengine pickles references into its checkpoints: the
    statistics of its log histories, and the curves of its one-cycle schedule."""
    if isinstance(owner, list | dict) or (isinstance(owner, type) and issubclass(owner, _StandIn)):
        return owner  # a method, or a member of an enumeration
    if name not in _METHODS.get(owner, ()):
        raise pickle.UnpicklingError(f"it asks for {owner!r}.{name}")
    return getattr(owner, name)


# The functions by which numpy unpickles arrays and scalars; numpy 1 called them otherwise.
_MAKE_ARRAY = np.empty(0).__reduce__()[0]
_MAKE_SCALAR = np.float64().__reduce__()[0]


def _make_list(items: Iterable[Any] = (), *_: Any) -> list:
    """A list in the place of a deque, as PyTorch's unpickler fills no others."""
    return list(items)


def _make_dict(*_: Any) -> OrderedDict:
    return OrderedDict()


# Modules of Python whose objects are data, and the beginnings of PyTorch's names for tensors.
_DATA_MODULES = (
    *(
        "argparse",
        "collections",
        "copyreg",
        "datetime",
        "decimal",
        "enum",
        "fractions",
        "functools",
    ),
    *("inspect", "logging", "pathlib", "random", "re", "types", "typing", "uuid", "zoneinfo"),
)
_TENSORS = ("torch._utils.", "torch._tensor.", "torch.storage.")

_PATHS = ("pathlib.PosixPath", "pathlib.WindowsPath")
# Dicts of settings that training scripts save beside the weights. PyTorch's unpickler fills no
# dicts of other classes than its own, and the packages may be missing.
_CONFIGS = (
    "yacs.config.CfgNode",
    "fvcore.common.config.CfgNode",
    "easydict.EasyDict",
    "addict.addict.Dict",
    "mmengine.config.config.ConfigDict",
    "mmcv.utils.config.ConfigDict",
)

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")

# These hold data alone. mmengine's own list also allows the real getattr.
_SAFE_GLOBALS: list[Any] = [
    # What training scripts save of their arguments.
    argparse.Namespace,
    *((pathlib.PurePath, name) for name in _PATHS),
    *((OrderedDict, name) for name in _CONFIGS),
    *((set, f"{module}.set") for module in ("builtins", "__builtin__")),
    *_METHODS,
    (_method_of_mmengine, "builtins.getattr"),
    *(list, tuple, dict, str, bytes, int, float, bool, object),
    (_make_list, "collections.deque"),
    (_make_dict, "collections.defaultdict"),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["All"]},
    codecs.encode,  # the bytes of arrays, by the first protocols
    datetime.date,
    datetime.datetime,
    datetime.timedelta,
    frozenset,
    range,
    slice,
    SimpleNamespace,
    _MAKE_ARRAY,
    _MAKE_SCALAR,
    (_MAKE_ARRAY, "numpy.core.multiarray._reconstruct"),
    (_MAKE_SCALAR, "numpy.core.multiarray.scalar"),
]


def read_checkpoint(
    path: str | Path, map_location: Any = "cpu", mesh: DeviceMesh | None = None
) -> dict:
    """Read a ``.pth`` of mmengine, of timm or of a paper's authors, or a ``.safetensors`` file.

    The folder of a fully sharded training is read like the file of any other. No code in the file
    is run.

    Args:
        path: path of the file or folder.
        map_location: as ``torch.load`` takes it. The tensors of shards are on the CPU.
        mesh: processes that each read their shards of a folder; with None its tensors are whole.

    Returns:
        A dict with at least ``state_dict``; a checkpoint of a training run also has ``meta``,
        ``optimizer``, ``param_schedulers`` and ``message_hub``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, holds code or no weights.
    """
    path = Path(path).expanduser()
    if is_sharded(path):
        return read_shards(read_checkpoint(path / REST, map_location), path, mesh)
    if path.is_dir():
        files = some(sorted(f.name for f in path.iterdir() if f.suffix in _SUFFIXES)) or "none"
        raise CheckpointError(
            f"checkpoint {path} is a folder: name the file of weights in it (there are {files})"
        )
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        if _is_safetensors(path):
            content = safetensors.torch.load_file(path)
        else:
            content = _load(path, map_location)
    except pickle.UnpicklingError as error:
        protocol, foreign = _foreign_names(path)
        calls = [name for name in foreign if not _is_harmless(name)]
        if protocol > 2 and not calls:
            raise CheckpointError(
                f"checkpoint {path} is a pickle of protocol {protocol}, and without running code "
                "PyTorch reads protocol 2: save it by torch.save, without pickle_protocol"
            ) from error
        if not foreign:
            raise _not_a_checkpoint(path) from error
        calls = calls or [n for n in foreign if not n.startswith(("torch.", "collections."))]
        calls = calls or foreign
        raise CheckpointError(
            f"checkpoint {path} is a Python pickle that wants to run code "
            f"({', '.join(calls[:3])}), and is refused: take its weights as .safetensors, or as "
            "tensors alone"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint {path} is truncated or damaged ({path.stat().st_size} bytes): "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    # The unpickler takes the bytes of a text for its instructions, and fails in many ways.
    except Exception as error:
        raise _not_a_checkpoint(path) from error
    held = (content, *(content.values() if isinstance(content, Mapping) else ()))
    objects = [type(value).__name__ for value in held if isinstance(value, _StandIn)]
    if isinstance(content, Mapping):
        state = unwrap(content)
        kept = content if "state_dict" in content else {}
        kept = {k: v for k, v in kept.items() if k not in AVERAGED or is_raw(content, k)}
        content = {**kept, "state_dict": state}
        if isinstance(state, Mapping) and any(isinstance(v, Tensor) for v in state.values()):
            return content
    found = f", but whole objects ({', '.join(objects[:3])}): save their state_dict()"
    raise CheckpointError(f"checkpoint {path} holds no weights{found if objects else ''}")


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do, whatever its name: 8 bytes, and a JSON object."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def _not_a_checkpoint(path: Path) -> CheckpointError:
    with open(path, "rb") as file:
        start = file.read(64).removeprefix(codecs.BOM_UTF8)
    what = f"{path.stat().st_size} bytes"
    if start.lstrip()[:1] == b"<":
        what += "; it is a web page, so take the address of the file itself"
    elif (line := start.decode("latin-1").split("\n")[0]) and line.isascii() and line.isprintable():
        what += f"; it begins with the text {line[:32]!r}"
    return CheckpointError(f"checkpoint {path} is damaged or no checkpoint ({what})")


class _StandIn(list):
    """What stands for an object of a class, or for a function, that a checkpoint holds beside its
    weights. Its arguments and its state are dropped, and nothing of it is imported or run.

    Raises:
        UnpicklingError: it would be made by a call of code.
    """

    def __new__(cls, *_: Any, **__: Any) -> _StandIn:
        if not _is_harmless(cls.__name__):
            raise pickle.UnpicklingError(f"it calls {cls.__name__}")
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Does nothing."""


class _DictStandIn:
    """What stands for a dict of a class that is not known."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


def _is_harmless(name: str) -> bool:
    """Whether what a checkpoint makes by calling `name` is data: an instance of a class, unless it
    is one of Python's own outside a few modules."""
    top, _, _ = name.partition(".")
    if top in _DATA_MODULES or name.startswith("numpy.random."):
        return True
    class_like = name.rpartition(".")[2].lstrip("_")[:1].isupper()
    # Of Python's built-in names those of exceptions are so written.
    return class_like and (top == "builtins" or top not in sys.stdlib_module_names)


def _load(path: Path, map_location: Any) -> Any:
    """The content of a file of ``torch.save``, with stand-ins for objects that are not known.

    Raises:
        UnpicklingError: the file is no such file, or would run code.
    """
    _, foreign = _foreign_names(path)
    foreign = [name for name in foreign if name != "builtins.getattr"]
    stand_ins: dict[str, Any] = {name: type(name, (_StandIn,), {}) for name in foreign}
    for _ in range(len(foreign) + 1):
        known = [*_SAFE_GLOBALS, *((stand_in, name) for name, stand_in in stand_ins.items())]
        try:
            # By its path PyTorch would take a file for what its name says.
            with torch.serialization.safe_globals(known), open(path, "rb") as file:
                return torch.load(file, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            # Keys are set in what PyTorch's unpickler knows for a dict alone.
            dicts = [name for name, each in stand_ins.items() if str(each) in str(error)]
            if "SETITEM" not in str(error) or not dicts or not _is_harmless(dicts[0]):
                raise
            stand_ins[dicts[0]] = type(dicts[0], (_DictStandIn,), {})
    raise pickle.UnpicklingError("it sets keys in what is no dict")


def _foreign_names(path: Path) -> tuple[int, list[str]]:
    """The protocol of a pickle, and the names that it would import beyond those that are known
    here. The pickle is not run."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.endswith("data.pkl")), None)
            content = archive.read(name) if name else b""
    else:
        content = path.read_bytes()
    known = {each[1] if isinstance(each, tuple) else _name_of(each) for each in _SAFE_GLOBALS}
    known.remove("builtins.getattr")  # most of what it reaches is refused
    protocol, names, strings = 0, [], []
    stream = io.BytesIO(content)
    try:
        # Before version 1.6 PyTorch wrote several pickles, one after another.
        for _ in range(4):
            for opcode, value, _ in pickletools.genops(stream):
                if opcode.name == "PROTO":
                    protocol = max(protocol, cast(int, value))
                elif opcode.name == "GLOBAL" and value is not None:
                    names.append(_name_today(*value.split(" ", 1)))
                elif opcode.name == "STACK_GLOBAL":
                    names.append(".".join(strings[-2:]))
                elif isinstance(value, str):
                    strings.append(value)
    except Exception:  # the file ends early or is no pickle; the names up to there still count
        pass
    names = [n for n in dict.fromkeys(names) if n not in known and not n.startswith(_TENSORS)]
    return protocol, names


def _name_of(known: Any) -> str:
    return f"{known.__module__}.{known.__qualname__}"


def _name_today(module: str, name: str) -> str:
    """A name of protocol 2, which has those of Python 2, as PyTorch's unpickler looks it up."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def fetch_checkpoint(place: str, map_location: Any = "cpu", mesh: DeviceMesh | None = None) -> dict:
    """Read a checkpoint from a file, or from a web address after downloading it once.

    In a distributed run the main process downloads, and the others wait for the file.

    Args:
        place: path of a file or folder, or an ``http://`` or ``https://`` address.
        map_location, mesh: as :func:`read_checkpoint` takes them.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, holds code or no weights.
    """
    if not place.startswith(("http://", "https://")):
        return read_checkpoint(place, map_location, mesh)
    folder = Path(torch.hub.get_dir(), "checkpoints")
    target = folder / place.split("?")[0].rsplit("/", 1)[-1]
    if is_main_process() and not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(place, str(target))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return read_checkpoint(target, map_location)


@HOOKS.register_module()
class CheckedLoadHook(Hook):
    """Refuse a checkpoint of another model; mmengine would load the weights that happen to fit.

    Names of timm, without ``backbone.``, are accepted as well, and so is a checkpoint that the
    model's own ``checkpoint_filter_fn`` converts. For fine-tuning on other classes, ``load_from``
    may differ from the model in the shape of its classifier or, for a detector, of its heads: these
    weights are left out with a warning.

    Raises:
        CheckpointError: the checkpoint does not fit the model, or lacks what resuming needs.
    """

    priority = "VERY_HIGH"

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        source = runner._load_from or find_latest_checkpoint(runner.work_dir)
        own = model.state_dict()
        state = dict(clean_names(checkpoint["state_dict"], own=True))
        message = f"checkpoint {source} does not fit the model of the config"
        try:
            state = _convert(state, model)
        except CheckpointError as error:
            raise CheckpointError(f"{message}: {error}") from error
        checkpoint["state_dict"] = state
        if runner._resume and "optimizer" not in checkpoint:
            raise CheckpointError(
                f"checkpoint {source} holds weights alone, and resuming needs the optimiser too: "
                "take an epoch_*.pth, or start from it with --cfg-options load_from=..."
            )

        classifier = _classifier_of(model)
        other = [
            key
            for key, weight in state.items()
            if key in own
            and own[key].shape != weight.shape
            and (
                key.startswith(classifier) and own[key].shape[:1] != weight.shape[:1]
                if classifier
                else not key.startswith(_CLASSLESS)
            )
        ]
        if not other:
            check_fit(state, model, message)
            _compare_names(runner, checkpoint, source)
            return
        theirs, ours = tuple(state[other[0]].shape), tuple(own[other[0]].shape)
        if classifier:
            trained = f"for {theirs[0]} classes, and the config has {ours[0]}"
            fix = f"model.num_classes={theirs[0]}"
        else:
            trained = f"for other classes or queries ({other[0]} is {theirs}, the model's {ours})"
            fix = "the heads' num_classes and the data set's classes to its own"
        fine_tuning = not isinstance(runner._train_loop, dict | None) and not runner._resume
        if not fine_tuning:
            raise CheckpointError(
                f"checkpoint {source} was trained {trained}: set {fix}, or take another checkpoint"
            )
        what = "its classifier is" if classifier else f"{len(other)} weights of its heads are"
        runner.logger.warning(f"{source} was trained {trained}: {what} left out")
        left_out = [key for key in state if key.startswith(classifier)] if classifier else other
        for key in left_out:
            del state[key]
        check_fit(state, model, message, ignore=tuple(left_out))


def _convert(state: dict[str, Tensor], model: torch.nn.Module) -> dict[str, Tensor]:
    """Weights with the names of the model, from names of timm or of a paper's authors."""
    from .backbone import convert_backbone, convert_model

    if convert := cast(Any, getattr(model, "checkpoint_filter_fn", None)):
        return convert(state)
    own, backbone = model.state_dict(), getattr(model, "backbone", None)
    if backbone is None or any(k in own for k in state if k.startswith("backbone.")):
        return state
    if all(k.startswith("backbone.") for k in own):  # a classifier
        if any(k.startswith("backbone.") for k in state):
            return state
        return {f"backbone.{k}": v for k, v in convert_model(state, backbone).items()}
    return convert_backbone(state, backbone)


# Parts of a detector whose weights do not depend on the classes.
_CLASSLESS = ("backbone.", "neck.")


def _compare_names(runner: Any, checkpoint: Mapping, source: str | None) -> None:
    """Warn in testing when the classes have other names, or another order, than in training."""
    if isinstance(runner._test_loop, dict | None):
        return
    meta = checkpoint.get("meta")
    metas = (
        meta.get("dataset_meta") if isinstance(meta, Mapping) else None,
        getattr(runner.test_dataloader.dataset, "metainfo", None),
    )
    theirs, ours = (tuple((meta or {}).get("classes") or ()) for meta in metas)
    differ = [f"{a} for {b}" for a, b in zip(theirs, ours, strict=False) if a != b]
    if theirs and ours and differ:
        runner.logger.warning(
            f"{source} was trained with other names of classes than the test data have: "
            f"{', '.join(differ[:3])}{', ...' if len(differ) > 3 else ''}"
        )


def _classifier_of(model: torch.nn.Module) -> tuple[str, ...]:
    """Prefixes of the weights whose first axis is the classes: those in the model's attribute
    ``classifiers``, or the classifier of its timm model."""
    if (prefixes := getattr(model, "classifiers", None)) is not None:
        return prefixes
    get_classifier = getattr(getattr(model, "backbone", None), "get_classifier", None)
    if get_classifier is None:
        return ()
    found = get_classifier()
    classifiers = found if isinstance(found, tuple) else (found,)
    return tuple(
        f"{n}." for n, m in model.named_modules() if any(m is each for each in classifiers)
    )


def _check_finite(runner: Any, last: str | Path | None) -> None:
    bad = [name for name, p in runner.model.named_parameters() if not local(p).isfinite().all()]
    # Processes that hold different shards of the weights must stop together.
    bad = sorted({name for names in all_gather_object(bad) for name in names})
    if bad:
        raise CheckpointError(
            f"the training has diverged: {len(bad)} weights are not finite ({', '.join(bad[:3])}"
            f"{', ...' if len(bad) > 3 else ''}). No checkpoint was written of them"
            + (f", the last is {last}" if last else "")
            + ": lower optim_wrapper.optimizer.lr, or set optim_wrapper.clip_grad.max_norm"
        )


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """mmengine's hook in an order that a kill at any moment does not hurt.

    It writes the new checkpoint, then ``last_checkpoint``, and only then removes the old one.
    Local files are written by :class:`AtomicLocalBackend`, unless ``backend_args`` names another.

    Raises:
        CheckpointError: the training has diverged; the checkpoints from before stay.
    """

    file_backend: Any

    def before_train(self, runner: Any) -> None:
        if self.backend_args is None and "://" not in (self.out_dir or runner.work_dir):
            self.backend_args = {"backend": "atomic"}
        super().before_train(runner)
        if self.max_keep_ckpts > 0:
            self.keep_ckpt_ids = deque(self.keep_ckpt_ids)
        self._check_watched_metrics(runner)

    def _check_watched_metrics(self, runner: Any) -> None:
        """Compare the names in ``save_best``, and those that early stopping and schedules watch,
        with those that the metrics of the validation give.

        Raises:
            ValueError: no metric gives such a name.
        """
        loop = runner.val_loop
        if loop is None:
            return
        known: list[str] = []
        for metric in loop.evaluator.metrics:
            if not hasattr(metric, "names"):  # of another library, which may give any
                return
            known += [f"{metric.prefix}/{name}" if metric.prefix else name for name in metric.names]
        watched = [
            ("default_hooks.checkpoint.save_best", name)
            for name in (self.key_indicators if self.save_best else ())
        ]
        schedulers: Any = runner.param_schedulers or []
        groups = schedulers.values() if isinstance(schedulers, dict) else [schedulers]
        parts = [("the monitor of a hook", hook) for hook in runner.hooks]
        parts += [("the monitor of a param_scheduler", s) for group in groups for s in group]
        for what, part in parts:
            if isinstance(name := getattr(part, "monitor", None), str):
                watched.append((f"{what}, {type(part).__name__},", name))
        for what, name in watched:
            if name not in ("auto", *known):
                raise ValueError(
                    f"{what} is {name!r}, and the validation measures {', '.join(known)}: set it "
                    "to one of these"
                )

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict) -> None:
        _check_finite(runner, self.last_ckpt)
        outdated = []
        if self.max_keep_ckpts > 0:
            if step not in self.keep_ckpt_ids:
                self.keep_ckpt_ids.append(step)
            while len(self.keep_ckpt_ids) > self.max_keep_ckpts:
                outdated.append(self.keep_ckpt_ids.popleft())
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))

        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if not is_main_process():
            return
        AtomicLocalBackend().put_text(str(self.last_ckpt), Path(runner.work_dir, "last_checkpoint"))
        for old in outdated:
            self._remove(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old)))

    def _save_best_checkpoint(self, runner: Any, metrics: dict) -> None:
        if not self.save_best or len(self.key_indicators) > 1:
            super()._save_best_checkpoint(runner, metrics)
            return
        # mmengine removes the previous best checkpoint before it writes the new one. Hide the
        # previous one until the new one is on disk.
        previous, self.best_ckpt_path = self.best_ckpt_path, None
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            best, self.best_ckpt_path = self.best_ckpt_path, self.best_ckpt_path or previous
        if not (best and previous) or best == previous or not is_main_process():
            return
        # Of a training in another folder that was resumed, the previous one is left alone.
        if Path(previous).resolve().parent == Path(self.out_dir).resolve():
            self._remove(previous)

    def after_train(self, runner: Any) -> None:
        super().after_train(runner)
        weights = getattr(self, "best_ckpt_path", None) or self.last_ckpt
        if weights:
            runner.logger.info(f"Weights: {weights}")

    def _remove(self, path: str | Path) -> None:
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):
            self.file_backend.rmtree(path)
