"""Open a trained model, whatever it is kept in."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import timm
from mmengine.config import Config
from torch import nn

from linsight.backbones.checkpoint import CheckpointError, check_fit
from linsight.heads.checkpoint import read_checkpoint
from linsight.heads.classification import create_backbone


def open_model(source: str | Path, model_name: str | None = None) -> nn.Module:
    """A timm model with its weights, ready for inference.

    Args:
        source: a checkpoint of `linsight train`; a folder or ``.safetensors`` file of
            `linsight export`; a checkpoint of a paper's authors, with `model_name`; or the
            name of a model whose published weights timm fetches.
        model_name: timm's name of the model, where `source` does not say it.

    Returns:
        The model in evaluation mode. Its ``pretrained_cfg`` says how images are prepared
        (size, crop, mean, std) and, as ``label_names``, what the classes are called.

    Raises:
        FileNotFoundError: `source` is neither a file nor a model's name.
        CheckpointError: the file is damaged, or of another model.
    """
    path = Path(source)
    if not path.exists():
        return _published(str(source))
    if path.is_dir():
        return _exported(path)
    if path.suffix == ".safetensors" and model_name is None:
        if not (path.parent / "config.json").is_file():
            raise CheckpointError(f"{path} does not say which model it is of: give --model NAME")
        return _exported(path.parent)
    checkpoint = read_checkpoint(path)
    if config := checkpoint.get("meta", {}).get("cfg"):
        return _trained(path, checkpoint, Config.fromstring(config, ".py"))
    if model_name is None:
        raise CheckpointError(f"{path} does not say which model it is of: give --model NAME")
    try:
        return create_backbone(
            model_name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}
        ).eval()
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _published(name: str) -> nn.Module:
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise FileNotFoundError(
            f"{name!r} is neither a file nor a model of timm"
            + (f"; the nearest models are {', '.join(near)}" if near else "")
        )
    try:
        return timm.create_model(name, pretrained=True).eval()
    except RuntimeError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _exported(folder: Path) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"folder {folder} has no config.json: it is no exported model")
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _trained(path: Path, checkpoint: dict[str, Any], config: Config) -> nn.Module:
    if config.get("model", {}).get("type") != "ImageClassifier":
        raise CheckpointError(f"{path} is not of an image classifier of linsight")
    overlay = dict(config.test_dataloader.dataset.get("transform", {}))
    size = overlay.get("input_size", 224)
    overlay["input_size"] = (3, size, size) if isinstance(size, int) else (3, *size[-2:])
    overlay["num_classes"] = config.model.num_classes
    if classes := (checkpoint["meta"].get("dataset_meta") or {}).get("classes"):
        overlay["label_names"] = tuple(classes)
    backbone = dict(config.model.backbone) | {"pretrained": False}
    model = create_backbone(
        **backbone, num_classes=config.model.num_classes, pretrained_cfg_overlay=overlay
    )
    state = {
        name.removeprefix("backbone."): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith("backbone.")
    }
    check_fit(state, model, f"checkpoint {path} does not fit the model that it names")
    model.load_state_dict(state)
    return model.eval()


def how_to_load(name: str, path: Path, num_classes: int) -> str:
    """The statement that builds model `name` of timm with the weights in `path`."""
    # timm's models have 1000 classes, and so have their weights, unless told.
    classes = "" if num_classes == 1000 else f", num_classes={num_classes}"
    return (
        f'timm.create_model("{name}", pretrained=True{classes}, '
        f'pretrained_cfg_overlay=dict(file="{path}"{classes}))'
    )


def class_names(model: nn.Module) -> list[str]:
    """What the classes of a model are called; their numbers where nothing says."""
    names = model.pretrained_cfg.get("label_names")
    if names is None and model.num_classes == 1000:
        info = timm.data.ImageNetInfo()
        return [info.index_to_description(i) for i in range(1000)]
    return list(names or map(str, range(model.num_classes)))
