"""Open a trained model from any file that holds one."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
from mmengine.config import Config
from timm.data import ImageNetInfo
from torch import Tensor

from linsight.backbones.checkpoint import CheckpointError, TimmModel, check_fit
from linsight.data.augmentation import effective_settings
from linsight.heads.backbone import create_backbone
from linsight.heads.checkpoint import read_checkpoint
from linsight.heads.published import require_weights
from linsight.heads.sharding import is_sharded
from linsight.tools.config import ConfigError, load_config


@dataclass(frozen=True)
class Run:
    """The content of a checkpoint of `linsight train`.

    Attributes:
        config: config of the training.
        classes: names of the classes, or None if the data set has none.
        state: the weights.
    """

    config: Config
    classes: tuple[str, ...] | None
    state: dict[str, Tensor]


def find_checkpoint(source: str | Path) -> Path:
    """The best checkpoint in a work dir of `linsight train`, else the last one; else the path.

    Raises:
        CheckpointError: several are the best, of one training each.
    """
    path = Path(source)
    if not path.is_dir() or is_sharded(path):
        return path
    best = [x for x in sorted(path.glob("best_*")) if x.suffix == ".pth" or is_sharded(x)]
    if len(best) > 1:
        raise CheckpointError(
            f"{path} holds {len(best)} best checkpoints, of more than one training: name one of "
            f"them, such as {best[-1]}"
        )
    note = path / "last_checkpoint"  # mmengine's
    # Whatever it holds, what is not there is not found.
    name = note.read_text(errors="replace").strip() if note.is_file() else ""
    last = [path / Path(name).name]
    return next((file for file in (*best, *last) if file.exists()), path)


def read_run(source: str | Path, name: str | None = None) -> Run | None:
    """Read a checkpoint or work dir of `linsight train`; None if `source` is something else.

    A checkpoint of another origin is read as a run of the config `name`, if that is the name of
    one.

    Raises:
        CheckpointError: the file is damaged, or its config holds more than data or no model.
    """
    path = find_checkpoint(source)
    if not (path.is_file() or is_sharded(path)) or path.suffix == ".safetensors":
        return None
    checkpoint = read_checkpoint(path)
    meta = checkpoint.get("meta")
    if not isinstance(meta, Mapping):
        meta = {}
    if not meta.get("cfg"):
        try:
            config = load_config(name or "")
        except ConfigError:
            return None
        classes = meta.get("CLASSES")  # as mmsegmentation and mmdetection called them
        return Run(config, tuple(classes) if classes else None, checkpoint["state_dict"])
    try:
        config = Config(_literals(meta["cfg"]))
    except (SyntaxError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: its config is not plain data: {error}") from None
    model = config.get("model")
    if not isinstance(model, Mapping) or "type" not in model or "test_dataloader" not in config:
        raise CheckpointError(f"checkpoint {path}: its config lacks a model or a test_dataloader")
    classes = tuple((meta.get("dataset_meta") or {}).get("classes") or ())
    if classes and model.get("num_classes", len(classes)) != len(classes):
        raise CheckpointError(
            f"checkpoint {path} names {len(classes)} classes, and its config has "
            f"model.num_classes={model['num_classes']}"
        )
    return Run(config, classes or None, checkpoint["state_dict"])


def _literals(text: str) -> dict[str, Any]:
    """The values that the text of a config assigns. Unlike mmengine's reader it runs no code."""

    def value(node: ast.expr | None) -> Any:
        match node:
            case ast.Call(func=ast.Name("dict"), args=[], keywords=keywords):
                return {word.arg: value(word.value) for word in keywords}
            case ast.Call(func=ast.Name("dict"), args=[ast.Dict() as items], keywords=[]):
                return value(items)  # so mmengine writes keys that are no names
            case ast.Dict(keys=keys, values=values):
                return {value(k): value(v) for k, v in zip(keys, values, strict=True)}
            case ast.List(elts=items):
                return [value(item) for item in items]
            case ast.Tuple(elts=items):
                return tuple(map(value, items))
            case ast.Set(elts=items):
                return set(map(value, items))
            case ast.Name("inf" | "nan" as name):
                return float(name)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
        if node is None:
            raise ValueError("** unpacks a dict, which a config of plain data does not")
        return ast.literal_eval(node)

    values = {}
    for statement in ast.parse(text).body:
        match statement:
            case ast.Assign(targets=[ast.Name(name)]):
                values[name] = value(statement.value)
            case _:
                raise ValueError(f"line {statement.lineno} assigns no value to a name")
    return values


def open_model(source: str | Path, model_name: str | None = None) -> TimmModel:
    """A timm model with its weights, ready for inference.

    Args:
        source: a checkpoint or a work dir of `linsight train`; a folder or ``.safetensors`` file of
            `linsight export`; a checkpoint of a paper's authors, with `model_name`; or the
            name of a model whose published weights timm downloads.
        model_name: timm's name of the model, for files that do not name it.

    Returns:
        The model in evaluation mode. Its ``pretrained_cfg`` holds the preparation of images
        (size, crop, mean, std) and the names of the classes as ``label_names``.

    Raises:
        FileNotFoundError: `source` is neither a file nor the name of a model.
        CheckpointError: the file is damaged, or holds another model.
    """
    # timm's name of such a folder is understood as well.
    path = find_checkpoint(str(source).removeprefix("local-dir:"))
    if not path.exists():
        return _open_published(str(source))
    if path.is_dir() and not is_sharded(path):
        return _open_exported(path)
    if path.suffix == ".safetensors" and model_name is None:
        if not (path.parent / "config.json").is_file():
            raise CheckpointError(f"{path} does not say which model it is of: give --model NAME")
        return _open_exported(path.parent)
    if run := read_run(path):
        return _open_trained(path, run)
    if model_name is None:
        raise CheckpointError(f"{path} does not say which model it is of: give --model NAME")
    try:
        return create_backbone(model_name, path).eval()
    except (RuntimeError, ValueError) as error:
        named = str(path) in str(error)
        raise CheckpointError(str(error) if named else f"{path}: {error}") from error


def _open_published(name: str) -> TimmModel:
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise FileNotFoundError(
            f"{name!r} is neither a file nor a model of timm"
            + (f"; the nearest models are {', '.join(near)}" if near else "")
        )
    require_weights(name)
    try:
        return cast(TimmModel, timm.create_model(name, pretrained=True)).eval()
    except (RuntimeError, OSError) as error:
        raise CheckpointError(
            f"the weights of {name} could not be fetched ({error}); docs/weights.md says where "
            f"they are: give a file in place of {name}, and --model {name}"
        ) from error


def _open_exported(folder: Path) -> TimmModel:
    if not (folder / "config.json").is_file():
        files = sorted(folder.glob("model.*"))
        fix = f"give its file {files[0]}" if files else "it is no exported model"
        raise CheckpointError(f"folder {folder} has no config.json: {fix}")
    try:
        return cast(TimmModel, timm.create_model(f"local-dir:{folder}", pretrained=True)).eval()
    except CheckpointError:
        raise
    # timm raises KeyError, JSONDecodeError and others, depending on where the fault is.
    except Exception as error:
        raise CheckpointError(
            f"no model can be made of config.json and model.safetensors in {folder}: "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}; export it again"
        ) from error


# Arguments of timm's transform that change what is seen in evaluation, and their defaults. timm's
# record of a model's preparation has no place for them.
_NOT_KEPT = {"crop_border_pixels": 0, "tf_preprocessing": False, "normalize": True}


def _open_trained(path: Path, run: Run) -> TimmModel:
    config = run.config
    if config.get("model", {}).get("type") != "ImageClassifier":
        raise CheckpointError(f"{path} is not of an image classifier of linsight")
    settings = effective_settings(config.test_dataloader.dataset.get("transform"))
    if bare := [key for key in _NOT_KEPT if settings.get(key) not in (None, _NOT_KEPT[key])]:
        raise CheckpointError(
            f"checkpoint {path} was tested on pictures prepared by test_dataloader.dataset."
            f"transform.{bare[0]}={settings[bare[0]]}, which prediction does not do: train without"
        )
    # The others are of training, or say which of the two it is.
    overlay = {key: settings[key] for key in effective_settings(None)}
    size = overlay["input_size"]
    channels = config.model.backbone.get("in_chans", 3)
    height, width = (size, size) if isinstance(size, int) else size[-2:]
    overlay["input_size"] = (channels, height, width)
    overlay["num_classes"] = config.model.num_classes
    if run.classes:
        overlay["label_names"] = run.classes
    backbone: dict[str, Any] = dict(config.model.backbone) | {"pretrained": False}
    try:
        model = create_backbone(
            **backbone, num_classes=config.model.num_classes, pretrained_cfg_overlay=overlay
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: its config makes no model: {error}") from error
    state = {
        name.removeprefix("backbone."): value
        for name, value in run.state.items()
        if name.startswith("backbone.")
    }
    check_fit(state, model, f"checkpoint {path} does not fit the model that it names")
    model.load_state_dict(state)
    return model.eval()


def loading_statement(
    name: str, path: Path, num_classes: int, input_size: Sequence[int] = (3, 224, 224)
) -> str:
    """The statement that builds model `name` of timm with the weights in `path`."""
    # Without num_classes timm's models, and their weights, have 1000 classes.
    classes = "" if num_classes == 1000 else f", num_classes={num_classes}"
    channels = shape = ""
    if input_size[0] != 3:
        channels, shape = f", in_chans={input_size[0]}", f", input_size={tuple(input_size)}"
    return (
        f'timm.create_model("{name}", pretrained=True{classes}{channels}, '
        f'pretrained_cfg_overlay=dict(file="{path}"{classes}{shape}))'
    )


def class_names(model: TimmModel) -> list[str]:
    """Names of the classes of a model, or their numbers if it has no names."""
    names = model.pretrained_cfg.get("label_names")
    if names is None and model.num_classes == 1000:
        info = ImageNetInfo()
        return [info.index_to_description(i) for i in range(1000)]
    return list(names or map(str, range(model.num_classes)))
