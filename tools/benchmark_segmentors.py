"""Time a semantic segmentor of linsight's configs on several backbones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, cast

import timm
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from torch import Tensor, nn

from linsight.backbones.checkpoint import TimmModel
from linsight.backbones.initialization import shapes_only
from linsight.tools.benchmark_cases import Case, disable_randomness
from linsight.tools.benchmark_measure import Model
from linsight.tools.config import ConfigError, load_config


def cases(config: str, peers: list[str], size: tuple[int, int], batch: int) -> Iterator[Case]:
    """Cases of the segmentor of a config, on its own backbone and on others.

    Args:
        config: name or path of the config.
        peers: names of models of timm.
        size: (height, width) of the images in pixels.
        batch: number of images. A batch of one has no variance for batch normalisation where
            UPerNet pools to a single pixel.

    Raises:
        ConfigError: there is no such config, or it has no segmentor.
    """
    model = load_config(config).model
    if model.type != "SemanticSegmentor":
        raise ConfigError(f"{config} is of a {model.type}, and no SemanticSegmentor")
    height, width = size
    for name in (model.backbone.model_name, *peers):
        own = name == model.backbone.model_name
        yield Case(
            kind="segmentors",
            name=f"{_short(model)} {name}",
            peer_of="" if own else f"{_short(model)} {model.backbone.model_name}",
            resolution=height,
            batch=batch,
            shape=f"{batch} x {height} x {width}",
            build=_builder(model if own else _replace_backbone(name, model), size),
            width=width,
        )


def _short(model: ConfigDict) -> str:
    return model.decode_head.type.removesuffix("Head")


def _replace_backbone(name: str, model: Any) -> ConfigDict:
    """The model on another backbone."""
    if not timm.is_model(name):
        raise ConfigError(f"--peer: timm has no model {name!r}")
    with shapes_only():
        levels = len(cast(TimmModel, timm.create_model(name)).feature_info)
    kept = ("output_norm_eps", "drop_path_rate")
    backbone = {key: value for key, value in model.backbone.items() if key in kept}
    model = model.copy()
    model.backbone = {**backbone, "model_name": name, "out_indices": tuple(range(levels))[-4:]}
    return model


def _builder(model: Any, size: tuple[int, int]) -> Callable[[torch.device], nn.Module]:
    def build(device: torch.device) -> nn.Module:
        backbone = {**model.backbone, "pretrained": False}
        # timm's Swin, for example, makes its masks for one image size.
        config = timm.get_pretrained_cfg(backbone["model_name"])
        if getattr(config, "fixed_input_size", False):
            backbone["img_size"] = size
        return disable_randomness(MODELS.build({**model, "backbone": backbone}))

    return build


class Segmentor(Model):
    """A semantic segmentor. Its inference maps images to labels, and it is trained on labels of the
    images' size."""

    def data(self, count: int) -> tuple[Tensor, Tensor]:
        images, _ = super().data(count)
        classes = self.module.num_classes
        return images, torch.randint(classes, (count, *self.case.size), device=self.device)

    def _backward(
        self, function: Callable[..., Any], images: Tensor, labels: Tensor, exact: bool = False
    ) -> Tensor:
        with self.autocast(exact):
            losses = function(images, labels, mode="loss")
        loss = reduce(torch.add, losses.values())
        loss.backward()
        return loss.detach().reshape(1, 1)

    @torch.inference_mode()
    def predict(self) -> Any:
        with self.autocast():
            return self.function(self.images, mode="predict")
