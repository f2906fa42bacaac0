"""What a training on a user's data starts from: the model, its weights, and the memory it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from linsight.backbones.initialization import shapes_only
from linsight.heads.backbone import create_backbone, is_plain
from linsight.heads.published import require_weights
from linsight.kernels import force
from linsight.tools.config import ConfigError
from linsight.tools.model import Run, read_run

KNOWN = ("pretrained", "none")
_NO_MODEL = "--model is missing, such as --model rala_vit_tiny: linsight models"


def check_names(model: str | None, weights: str) -> None:
    """Refuse names of a model and its weights that do not exist, at once.

    Raises:
        ConfigError: no model is named.
        ValueError: there is no such model.
        FileNotFoundError: there is no such file.
    """
    if weights not in KNOWN and not Path(weights).exists():
        raise FileNotFoundError(f"--weights is {weights!r}, expected pretrained, none or a file")
    if model is None and weights in KNOWN:
        raise ConfigError(_NO_MODEL)
    place, colon, _ = (model or "").partition(":")
    if colon and place not in ("local-dir", "hf-hub"):
        raise ConfigError(f"--model is {model!r}, expected a name, local-dir:FOLDER or hf-hub:NAME")
    if place and not colon and not timm.is_model(place.split(".")[0]):
        create_backbone(place)  # its error names the nearest models


class Start:
    """The model, and the weights that a training starts from.

    Attributes:
        name: timm's name of the model.
        options: further arguments of it.
        said: where the weights come from, in words.
        pretrained: whether timm fetches them.
        checkpoint: file of weights of the backbone, or None.
        load_from: checkpoint of a training for the same task, or None.
        state: weights of a backbone that are to be written to `checkpoint`, or None.
        image_size: image size that the weights were trained with, or None.
        preparation: mean, std, interpolation and crop_pct of images.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.options: dict[str, Any] = {}
        self.said = "random weights"
        self.pretrained = False
        self.checkpoint: str | None = None
        self.load_from: str | None = None
        self.state: dict[str, torch.Tensor] | None = None
        self.image_size: int | None = None
        config = get_pretrained_cfg(name)
        values = config.to_dict() if config is not None else {}
        chosen = ("mean", "std", "interpolation", "crop_pct")
        self.preparation = {key: values[key] for key in chosen if values.get(key) is not None}
        self.published = bool(config and (config.hf_hub_id or config.url))
        self.fixed_input_size = bool(values.get("fixed_input_size"))
        self.fixed = int((values.get("input_size") or (3, 224, 224))[-1])

    @classmethod
    def of(cls, model: str | None, weights: str, task: str) -> Start:
        """The start that a user asks for.

        Args:
            model: timm's name; None for that in the file of weights.
            weights: ``"pretrained"``, ``"none"``, or a file.
            task: what is to be learned.

        Raises:
            ConfigError: no model is named, or it has no published weights.
            CheckpointError: the weights cannot be had.
            FileNotFoundError: there is no such file.
        """
        known = weights in KNOWN
        check_names(model, weights)
        run = None if known else read_run(weights)
        name = model or (run and run.config.model.backbone.model_name)
        if not name:
            raise ConfigError(_NO_MODEL)
        start = cls(name)
        if run is not None:
            start._take(run, weights, task)
        elif not known:
            start.checkpoint = str(Path(weights).resolve())
            start.said = f"the weights in {weights}"
        elif weights == "pretrained" and not start.published:
            raise ConfigError(
                f"{name} has no published weights to fetch: give a file as --weights FILE "
                "(docs/weights.md says where there are some), or --weights none to train from "
                "scratch"
            )
        elif weights == "pretrained":
            require_weights(name)
            start.pretrained, start.said = True, "its published weights"
        return start

    def _take(self, run: Run, file: str, task: str) -> None:
        """Start from a checkpoint of `linsight train`."""
        model = run.config.model
        other = model.backbone.model_name
        if other != self.name:
            raise ConfigError(f"--weights {file} is of {other}, and --model is {self.name}")
        self.said = f"the weights in {file}"
        kinds = {
            "ImageClassifier": "classification",
            "SemanticSegmentor": "segmentation",
            "TimmRetinaNet": "detection",
            "TimmMaskRCNN": "instances",
        }
        own = ("model_name", "type", "pretrained", "checkpoint", "frozen_stages", "out_indices")
        own = (*own, "output_norm_eps", "norm_eval", "with_cp", "compile", "init_cfg")
        self.options = {k: v for k, v in model.backbone.items() if k not in own}
        transform = run.config.test_dataloader.dataset.get("transform") or {}
        size = transform.get("input_size")
        self.image_size = size if isinstance(size, int) else None
        self.preparation |= {k: transform[k] for k in self.preparation if k in transform}
        if kinds.get(model.type) == task:
            self.load_from = str(Path(file).resolve())
            return
        prefix = "backbone." if model.type == "ImageClassifier" else "backbone.model."
        self.state = {
            key.removeprefix(prefix): value
            for key, value in run.state.items()
            if key.startswith(prefix)
        }
        if model.type != "ImageClassifier":
            # It keeps nothing that stands behind the last stage: this begins anew.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                net = timm.create_model(self.name, num_classes=0, **self.options)
            self.state = {**cast(nn.Module, net).state_dict(), **self.state}

    def backbone(self) -> dict[str, Any]:
        """Arguments of the backbone in a config."""
        weights: dict[str, Any] = {"pretrained": True} if self.pretrained else {}
        if self.checkpoint:
            weights = {"checkpoint": self.checkpoint}
        return {"model_name": self.name, **self.options, **weights}

    def check_body(self, task: str) -> bool:
        """Whether the body has maps of one stride, of which a neck makes a pyramid.

        Raises:
            ConfigError: it has maps of two or three strides, or takes images of one size alone.
        """
        name = self.name
        with shapes_only():
            if self.fixed_input_size and not self._free_size():
                raise ConfigError(
                    f"--model {name} takes images of {self.fixed} pixels alone, and "
                    f"{task} needs any size: take one of linsight models, such as rala_vit_tiny"
                )
            levels = cast(Any, timm.create_model(name)).feature_info
        strides = {level["reduction"] for level in levels}
        if not is_plain(levels) and len(strides) < 4:
            raise ConfigError(
                f"--model {name} has maps of the strides "
                f"{', '.join(map(str, sorted(strides)))} alone, and {task} needs "
                "four, such as those of rala_vit_tiny"
            )
        return is_plain(levels)

    def has_progressive_layers(self) -> bool:
        """Whether the model has layers that are to be told how far training is."""
        with shapes_only():
            model = cast(nn.Module, timm.create_model(self.name, **self.options))
        return any(hasattr(part, "set_progress") for part in model.modules())

    def _free_size(self) -> bool:
        """Whether timm's model can be told to take images of any size; it then is."""
        choices: list[dict[str, Any]] = [{"dynamic_img_size": True}, {"strict_img_size": False}]
        for option in choices:
            try:
                with shapes_only():
                    timm.create_model(self.name, **self.options | option)
            except TypeError:
                continue
            self.options |= option
            return True
        return False


def activation_bytes(start: Start, size: tuple[int, int], half: bool) -> int:
    """Bytes that the gradient of one image keeps in a model, without computing anything.

    Args:
        start: the model.
        size: (height, width) of the image.
        half: whether it is trained in 16 bits.
    """
    kept: dict[int, int] = {}
    # The storages have to stay, so that no two have the same address.
    alive: list[Any] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(storage)
        kept[id(storage) if tensor.is_meta else storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.device("meta"), force("reference"):
        with shapes_only():
            model = cast(nn.Module, timm.create_model(start.name, num_classes=8, **start.options))
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.train()(torch.empty(2, 3, *size)).sum()
    saved = max(0, sum(kept.values()) - weights) // 2
    return max(1 << 20, saved // (2 if half else 1))
