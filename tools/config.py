"""Find a config, apply the overrides of the command line, and check it before anything is built."""

from __future__ import annotations

import ast
import difflib
import inspect
import io
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, cast

import timm
import timm.data
import timm.optim
from mmengine import registry
from mmengine.config import Config, DictAction
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner, TestLoop, ValLoop
from mmengine.utils import get_object_from_string
from torch import nn
from torch.utils.data import DataLoader

from linsight.heads.backbone import TimmBackbone
from linsight.heads.distillation import Distillation

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@contextmanager
def quiet_mmdet() -> Iterator[None]:
    """Leave out what mmdet says, while it is imported, of packages that it can do without."""
    printed = io.StringIO()
    try:
        with warnings.catch_warnings(), redirect_stdout(printed):
            warnings.filterwarnings("ignore", message="faster_coco_eval is not installed")
            yield
    finally:
        lines = printed.getvalue().splitlines(keepends=True)
        sys.stdout.write("".join(line for line in lines if "Skipping OneDL" not in line))


class ConfigError(ValueError):
    """A config that is missing, or that holds a name or a value that is not understood."""


def find_config(name_or_path: str | Path) -> Path:
    """The file of a config, given by its path or by the name of one of linsight's configs.

    Names are looked up in all folders of configs.

    Raises:
        ConfigError: there is no such config; the message has the nearest names.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    known = {file.stem: file for file in CONFIGS.glob("[!_]*/*.py")}
    if path.stem in known and path.suffix in ("", ".py") and path.parent == Path():
        return known[path.stem]
    raise ConfigError(
        f"config {str(name_or_path)!r} is neither a file nor a name of linsight's"
        + (_nearest(path.stem, known) or f", which are in {CONFIGS}; try rala_vit_nano_digits")
    )


def load_config(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a config, apply ``key=value`` overrides, and check every name in it.

    Args:
        name_or_path: name or path, as for :func:`find_config`.
        overrides: words in OpenMMLab's form after ``--cfg-options``:
            ``model.num_classes=10``, ``param_scheduler.0.end=2``, ``a.b=[1,2]``.

    Raises:
        ConfigError: a file, key, argument, type or model is unknown; the message has the
            nearest names.
    """
    path = find_config(name_or_path)
    try:
        with quiet_mmdet():
            config = Config.fromfile(path)
    except ImportError as error:
        if (missing := _missing_module(error)) in ("mmcv", "mmdet"):
            reason = f"detection needs {missing}: pip install 'linsight[det]'"
            raise ConfigError(f"config {path}: {reason}") from error
        raise ConfigError(f"config {path}: {error}") from error
    except (SyntaxError, FileNotFoundError) as error:
        raise ConfigError(f"config {path}: {error}") from error
    override(config, overrides)
    check_config(config)
    return config


def override(config: Config, overrides: Iterable[str]) -> None:
    """Apply ``key=value`` overrides to a config; :func:`check_config` then finds what is wrong.

    Raises:
        ConfigError: a key does not lead to anything in the config.
    """
    options = dict(map(_parse_override, overrides))
    for key in {option.split(".")[0] for option in options} - config.keys() - _TOP_LEVEL:
        near = _nearest(key, config.keys() | _TOP_LEVEL)
        raise ConfigError(f"--cfg-options {key}: the config has no such key{near}")
    for key, value in options.items():
        held = _value_at(config, key)
        if isinstance(held, Mapping) and not isinstance(value, Mapping | None):
            example = next(iter(held), "key")
            raise ConfigError(
                f"--cfg-options {key}={value}: {key} is a dict; set what is in it, as "
                f"{key}.{example}=VALUE, or leave it out by {key}=None"
            )
    data_root = config.get("data_root")
    # A new key below the top level may be an argument of what is built there; check_config
    # finds out.
    try:
        config.merge_from_dict(options)
    except (KeyError, TypeError, IndexError, ValueError, AssertionError) as error:
        # mmengine appends the whole list that an index exceeds.
        reason = str(error).strip("\"'").split(" of list")[0]
        raise ConfigError(f"--cfg-options {' '.join(options)}: {reason}") from error
    if "data_root" in options:
        _move_data(config, data_root, str(options["data_root"]))


def _value_at(config: Config, key: str) -> Any:
    """The value at a dotted key, or None."""
    node: Any = config
    for part in key.split("."):
        if isinstance(node, list | tuple) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, Config | Mapping):
            node = node.get(part)
        else:
            return None
    return node


def _missing_module(error: BaseException | None) -> str | None:
    """Name of the top-level module whose absence caused an import error, or None."""
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__ or error.__context__
    return error.name.partition(".")[0] if error is not None and error.name else None


def _move_data(config: Config, old: str, new: str) -> None:
    """Replace the folder `old` by `new` in every path of the config, which holds copies of it."""
    old, new = old.rstrip("/"), new.rstrip("/")
    for _, node in _dicts(config):
        for key, value in node.items():
            if isinstance(value, str) and (value == old or value.startswith(f"{old}/")):
                node[key] = new + value[len(old) :]


def _parse_override(word: str) -> tuple[str, Any]:
    key, equals, value = word.partition("=")
    if not (equals and key):
        raise ConfigError(f"--cfg-options takes key=value, got {word!r}")
    return key, _parse_value(word, value)


def _parse_value(word: str, text: str) -> Any:
    """The value of an override: mmengine's lists and tuples, Python's dicts, numbers or a text."""
    try:
        if text.startswith("{"):
            return ast.literal_eval(text)
        parsed = DictAction._parse_iterable(text)
        # mmengine takes spaces out of texts, too.
        return text.strip("'\"") if isinstance(parsed, str) else parsed
    # mmengine recurses without end over brackets that are no list and no tuple.
    except (RecursionError, AssertionError, SyntaxError, ValueError):
        if text[:1] in ("'", '"') and text[-1:] == text[:1]:
            return text[1:-1]
        with suppress(SyntaxError, ValueError):
            return list(ast.literal_eval(f"[{text}]"))
    raise ConfigError(
        f"--cfg-options {word}: a list is [a, b], a tuple (a, b), a dict {{'a': 1, 'b': 2}}, or "
        f"one {word.partition('=')[0]}.NAME=VALUE per entry; put a text with brackets and "
        "commas in double quotes within single ones"
    )


def tta_of(config: Config | Mapping) -> dict:
    """The model of test-time augmentation in a config.

    Raises:
        ConfigError: the config has none.
    """
    if "tta_model" not in config:
        raise ConfigError(
            "--tta: the config has no tta_model and tta_pipeline. mmdet merges boxes alone, so "
            "there is none for detectors with masks, nor for scenes that may not be mirrored; "
            "segmentors take model.test_scales=[0.75,1.0,1.25] model.test_flip=True"
        )
    return dict(config["tta_model"])


# What a dict without a type configures, by its path, and further keys that it may have.
_LOADER = (DataLoader, {"dataset", "sampler", "batch_sampler", "num_batch_per_epoch"})
_UNTYPED: dict[str, tuple[Callable, set[str]]] = {
    "train_dataloader": _LOADER,
    "val_dataloader": _LOADER,
    "test_dataloader": _LOADER,
    "train_cfg": (EpochBasedTrainLoop, {"by_epoch"}),
    "val_cfg": (ValLoop, set()),
    "test_cfg": (TestLoop, set()),
    "auto_scale_lr": (dict, {"enable", "base_batch_size"}),
    "randomness": (Runner.set_randomness, set()),
    "env_cfg": (dict, {"cudnn_benchmark", "mp_cfg", "dist_cfg", "resource_limit"}),
    "optim_wrapper": (OptimWrapper, {"constructor", "paramwise_cfg"}),
    "model.mixup": (timm.data.Mixup, set()),
    "model.distillation": (Distillation, set()),
    "transform": (timm.data.create_transform, set()),
}
# Keys that a registry's builder removes before it calls the class, by name of the registry.
_BUILDER = {
    "hook": {"priority"},
    "parameter scheduler": {"convert_to_iter_based"},
    "optim_wrapper": {"constructor", "paramwise_cfg"},
}
# The range of a number, by its name.
_WHOLE = {
    **dict.fromkeys(("batch_size", "max_epochs", "max_iters", "val_interval"), (1, math.inf)),
    **dict.fromkeys(("num_classes", "input_size", "length"), (1, math.inf)),
    **dict.fromkeys(("num_workers", "seed"), (0, math.inf)),
}
_RANGES = {
    **_WHOLE,
    **dict.fromkeys(("lr", "weight_decay"), (0, math.inf)),
    **dict.fromkeys(("mixup_alpha", "cutmix_alpha"), (0, math.inf)),
    **dict.fromkeys(("drop_rate", "drop_path_rate", "label_smoothing"), (0, 1)),
    "corrupt_tolerance": (0, 1),
}
_FLAGS = {"drop_last", "shuffle", "pin_memory", "persistent_workers"}
# The arguments of mmengine's Runner, and further keys that it reads from the config.
_TOP_LEVEL = set(inspect.signature(Runner.__init__).parameters) - {"self", "cfg"} | {
    "compile",
    "sync_bn",
    "find_unused_parameters",
    "model_wrapper_cfg",
    "activation_checkpointing",
    "efficient_conv_bn_eval",
    "custom_imports",
    "runner_type",
    "default_scope",
    "strategy",
}


def check_config(config: Config) -> None:
    """Check every name in a config against what would be built from it.

    * A ``type`` must be registered, and its dict may hold only arguments of that type. The same
      holds for dicts without a type whose path tells what they configure.
    * A backbone's ``model_name`` must be a model of timm.
    * Numbers with a known name, such as ``batch_size``, must be in their range.
    * The model must be a dict, and a default hook a dict with a type.
    * An unknown top-level key is taken for a variable of the user, unless it resembles a known key.

    Raises:
        ConfigError: a name is unknown or a value out of range; the message has its path, and the
            nearest names or the range.
    """
    for key in config:
        near = difflib.get_close_matches(key, _TOP_LEVEL, n=1, cutoff=0.85)
        if near and key not in _TOP_LEVEL:
            raise ConfigError(f"config key {key!r} is unknown; did you mean {near[0]!r}?")
    if not isinstance(config.get("model"), Mapping | nn.Module):
        raise ConfigError(f"model is {config.get('model')!r}, expected a dict with a type")
    level = config.get("log_level", "INFO")
    named = isinstance(level, str) and isinstance(logging.getLevelName(level), int)
    if not named and not isinstance(level, int):
        raise ConfigError(f"log_level is {level!r}, expected one such as INFO or WARNING")
    scope = config.get("default_scope", "mmengine")
    for path, node in _dicts(config):
        _check_dict(path, node, scope)
        _check_values(path, node)


def _check_values(path: str, node: Mapping) -> None:
    for key in node.keys() & _RANGES.keys():
        least, most = _RANGES[key]
        kind, word = (int, "whole number") if key in _WHOLE else (int | float, "number")
        several = key == "input_size" and isinstance(node[key], list | tuple) and node[key]
        for value in node[key] if several else [node[key]]:
            known = isinstance(value, kind) and not isinstance(value, bool)
            if value is None or (known and least <= value <= most):
                continue
            end = "" if most == math.inf else f" and at most {most}"
            raise ConfigError(
                f"{path}.{key} is {node[key]!r}, expected a {word} of at least {least}{end}"
            )

    for key in node.keys() & _FLAGS:
        if not isinstance(node[key], bool | None):
            raise ConfigError(f"{path}.{key} is {node[key]!r}, expected True or False")


def _check_dict(path: str, node: Mapping, scope: str) -> None:
    if "model_name" in node and node.get("type", "TimmBackbone") == "TimmBackbone":
        _check_model_name(path, node["model_name"])
    if "type" in node:
        place = _find_type(path, node["type"], scope)
    elif path == "train_cfg" and not node.get("by_epoch", True):
        place = IterBasedTrainLoop, {"by_epoch"}
    elif path == "optim_wrapper.optimizer" and "opt" in node:
        place = _timm_optimizer(path, node["opt"])
    else:
        place = _UNTYPED.get("transform" if path.endswith(".transform") else path)
        if path.startswith("default_hooks.") and path.count(".") == 1:
            raise ConfigError(f"{path} has no type: name the hook that it is")
    # TimmBackbone passes unknown arguments to timm, which checks them when it builds the model.
    if place is None or place[0] is TimmBackbone:
        return
    built, extras = place
    if path.endswith("norm_cfg"):  # mmcv removes this key
        extras = extras | {"requires_grad"}
    names, anything = _parameters_of(built)
    names = names | extras
    if anything:
        return
    for key in node:
        if key not in names | {"type", "_scope_", "_delete_"}:
            raise ConfigError(
                f"{path}.{key}: {built.__qualname__} takes no {key!r}{_nearest(key, names)}"
            )


def _check_model_name(path: str, name: Any) -> None:
    if not isinstance(name, str):
        raise ConfigError(f"{path}.model_name is {name!r}, expected a name of timm's")
    # A name with a scheme, such as hf-hub:..., is looked up when the model is built.
    if ":" not in name and not timm.is_model(name):
        near = _nearest(name, timm.list_models())
        raise ConfigError(f"{path}.model_name: timm has no model {name!r}{near}")


def _timm_optimizer(path: str, name: Any) -> tuple[Callable, set[str]]:
    if not isinstance(name, str):
        raise ConfigError(f"{path}.opt is {name!r}, expected a name of timm's")
    try:
        optimizer = timm.optim.get_optimizer_class(name.split("_")[-1], bind_defaults=False)
    except ValueError:
        near = _nearest(name, cast(list[str], timm.optim.list_optimizers()))
        raise ConfigError(f"{path}.opt: timm has no optimizer {name!r}{near}") from None
    return optimizer, _parameters_of(timm.optim.create_optimizer_v2)[0] - {"kwargs"}


def _find_type(path: str, kind: Any, scope: str) -> tuple[Any, set[str]] | None:
    """The class or function of a type, and further keys that its registry accepts; None if the
    type cannot be looked up."""
    if callable(kind):
        return kind, set()
    if not isinstance(kind, str):
        raise ConfigError(f"{path}.type is {kind!r}, expected a registered name")
    known: set[str] = set()
    library, _, name = kind.rpartition(".")
    if "." in library:  # an import path, such as torchvision.transforms.v2.Resize
        if (built := get_object_from_string(kind)) is None:
            raise ConfigError(f"{path}.type: there is no {kind!r}")
        return built, set()
    for held in _registries(library or scope):
        held.import_from_location()
        if name in held.module_dict:
            return held.module_dict[name], _BUILDER.get(held.name, set())
        known.update(held.module_dict)
    # mmdet's configs also have names of mmcv's operators, such as RoIAlign and nms.
    if library or hasattr(sys.modules.get("mmcv.ops"), kind):
        return None
    raise ConfigError(f"{path}.type: nothing is registered as {kind!r}{_nearest(kind, known)}")


def _registries(scope: str) -> Iterator[registry.Registry]:
    """mmengine's registries, each after its child in the library `scope`, such as mmdet."""
    for value in vars(registry).values():
        if isinstance(value, registry.Registry):
            if scope in value.children:
                yield value.children[scope]
            yield value


def _parameters_of(built: Callable) -> tuple[set[str], bool]:
    """Names of the parameters of a callable, and whether it takes arguments of any name."""
    if not inspect.isclass(built):
        parameters = inspect.signature(built).parameters.values()
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return {p.name for p in parameters} - {"self"}, anything
    names: set[str] = set()
    # A class with **kwargs passes them to the next class in the method resolution order.
    for owner in built.__mro__:
        if "__init__" not in vars(owner):
            continue
        own, anything = _parameters_of(owner.__init__)
        names |= own
        if not anything:
            return names, False
    return names, built is not dict


def _dicts(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Config | Mapping):
        if path:
            yield path, node
        for key, value in node.items():
            yield from _dicts(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for index, value in enumerate(node):
            yield from _dicts(value, f"{path}.{index}")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return f"; the nearest are {', '.join(near)}" if near else ""
