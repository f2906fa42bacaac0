"""Models of whole tasks, by their configs, as `linsight benchmark configs` times them."""

from __future__ import annotations

from typing import Any

import timm
import torch
import typer
from mmengine.registry import MODELS
from torch import Tensor, nn

from linsight.backbones import ZOO
from linsight.tools.benchmark_cases import Case, without_chance
from linsight.tools.benchmark_measure import Model
from linsight.tools.config import ConfigError, load_config

CONFIGS = (
    "upernet_rala_vit_small_160k_ade20k",
    "upernet_rala_vit_small_160k_ade20k@swin_tiny_patch4_window7_224",
)
# Batches up to a number of pixels, on a GPU of 80 GB. Beyond, and on a CPU, as few as can be: of
# one image, batch normalisation has no variance where UPerNet pools to a single pixel.
LEAST = {"inference": 1, "training": 2}
BATCHES = {
    "inference": {512 * 512: 32, 1024 * 2048: 4},
    "training": {512 * 512: 16, 1024 * 2048: 2},
}


def default_batch(phase: str, size: tuple[int, int], device: torch.device) -> int:
    """The batch of 'inference' or 'training' at a size."""
    pixels = size[0] * size[1]
    batches = BATCHES[phase].items() if device.type == "cuda" else ()
    return next((n for most, n in batches if pixels <= most), LEAST[phase])


def case(name: str, size: tuple[int, int], batch: int) -> Case:
    """The model of a config at a size of images; ``CONFIG@MODEL`` has timm's MODEL as backbone.

    Raises:
        typer.BadParameter: there is no such config or model, or nothing here times it.
    """
    config, _, peer = name.partition("@")
    try:
        model = load_config(config).model
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    if model.type != "SemanticSegmentor":
        raise typer.BadParameter(f"{config} is of a {model.type}, which nothing here times")
    if peer:
        if not timm.is_model(peer):
            raise typer.BadParameter(f"timm has no model {peer!r}")
        with torch.device("meta"):
            levels = len(timm.create_model(peer).feature_info)
        model.backbone = {
            "model_name": peer,
            "out_indices": tuple(range(levels))[-4:],
            "output_norm_eps": model.backbone.get("output_norm_eps"),
        }

    model.backbone.pretrained = False

    def build(device: torch.device) -> nn.Module:
        try:
            built = MODELS.build({**model, "backbone": {**model.backbone, "img_size": size}})
        except (TypeError, ValueError):  # what only convolves takes no such argument
            built = MODELS.build(dict(model))
        return without_chance(built)

    height, width = size
    return Case(
        "configs",
        name,
        "" if model.backbone.model_name in ZOO else "linsight",
        height,
        batch,
        f"{batch} x {height} x {width}",
        build,
        width=width,
    )


class Segmentor(Model):
    """A semantic segmentor: its inference is from images to labels, and its step is trained on
    labels of the images' size."""

    def data(self, count: int) -> tuple[Tensor, Tensor]:
        images, _ = super().data(count)
        classes = self.module.num_classes
        return images, torch.randint(classes, (count, *self.case.size), device=self.device)

    def _backward(
        self, function: nn.Module, images: Tensor, labels: Tensor, exact: bool = False
    ) -> Tensor:
        with self._autocast(exact):
            losses = function(images, labels, mode="loss")
        loss = sum(losses.values())
        loss.backward()
        return loss.detach().reshape(1, 1)

    @torch.inference_mode()
    def predict(self) -> Any:
        with self._autocast(exact=False):
            return self.function(self.images, mode="predict")
