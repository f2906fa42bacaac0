"""Time a detector of linsight's configs on several backbones, in inference and in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import timm
import torch
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.registry import DefaultScope
from torch import nn

from linsight.backbones.checkpoint import TimmModel
from linsight.backbones.initialization import shapes_only
from linsight.data.digits_detection import DigitDetection
from linsight.tools.benchmark_cases import Case
from linsight.tools.benchmark_measure import Disagreement, Network
from linsight.tools.benchmark_timing import elapsed
from linsight.tools.config import load_config


def cases(config: str, peers: list[str], shorter: int, batch: int) -> Iterator[Case]:
    """Cases of the detector of a config, on its own backbone and on others.

    Args:
        config: name or path of the config.
        peers: names of models of timm.
        shorter: shorter side of the images in pixels. The longer side is 1333 / 800 times as long,
            as for COCO, and both are padded to multiples of 32.
        batch: number of images.
    """
    size = shorter, round(shorter * 1333 / 800)
    cfg = load_config(config)
    detector = cfg.model.type.removeprefix("Timm")
    padded = (-(-size[0] // 32) * 32, -(-size[1] // 32) * 32)
    for name in (cfg.model.backbone.model_name, *peers):
        own = name == cfg.model.backbone.model_name
        yield Case(
            kind="detectors",
            name=f"{detector} {name}",
            peer_of="" if own else f"{detector} {cfg.model.backbone.model_name}",
            resolution=shorter,
            batch=batch,
            shape=f"{batch} x 3 x {size[0]} x {size[1]}",
            build=_builder(cfg.model if own else _replace_backbone(name, cfg.model, padded)),
        )


def _replace_backbone(name: str, model: Any, size: tuple[int, int]) -> ConfigDict:
    """The model on another backbone, with the neck's channels to match."""
    model = model.copy()
    with shapes_only():
        levels = cast(TimmModel, timm.create_model(name)).feature_info
    # A convolutional network may have a finer map before the first stage's.
    chosen = range(len(levels))[-len(model.backbone.get("out_indices", range(4))) :]
    kept = ("type", "output_norm_eps", "drop_path_rate")
    backbone = {key: value for key, value in model.backbone.items() if key in kept}
    # timm's Swin, for example, makes its masks for one image size.
    if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
        backbone["img_size"] = size
    model.backbone = {**backbone, "model_name": name, "out_indices": tuple(chosen)}
    model.neck = {**model.neck, "in_channels": [levels[i]["num_chs"] for i in chosen]}
    return model


def _builder(model: Any) -> Callable[[torch.device], nn.Module]:
    def build(device: torch.device) -> nn.Module:
        cfg = model.copy()
        cfg.backbone = {**cfg.backbone, "pretrained": False}
        with DefaultScope.overwrite_default_scope("mmdet"):
            return MODELS.build(cfg)

    return build


class Detector(Network):
    """A detector on digit scenes, whose digits are its targets.

    The detector is not trained: in inference regions are proposed and classified, but hardly an
    object is found, so that few masks are computed. Regions are sampled at random, so the result
    cannot be compared with a wider dtype; the check is that losses, or scores, are finite.

    Raises:
        Disagreement: a loss or a score is not finite.
    """

    def compile_module(self) -> nn.Module:
        """Compile the backbone alone, since the work after it depends on the objects found."""
        self.module.backbone.compile(dynamic=False)
        return self.module

    def prepare(self) -> None:
        count = self.case.batch
        size = tuple(int(side) for side in self.case.shape.split(" x ")[2:])
        scenes = DigitDetection("train", count, [{"type": "PackDetInputs"}], size=size)
        batch = pseudo_collate([scenes[i] for i in range(count)])
        self.batch = self.module.data_preprocessor(batch, self.training)
        self.first_call = elapsed(self._check, self.device)
        self.check = "ok"

    def _check(self) -> None:
        if self.training:
            values = [self.learn()]
        else:
            values = [x.pred_instances.scores for x in self.predict()]
        if not all(value.isfinite().all() for value in values):
            raise Disagreement("the result is not finite")

    @torch.inference_mode()
    def predict(self) -> list:
        with self.autocast():
            return self.module(**self.batch, mode="predict")

    def learn(self) -> torch.Tensor:
        with self.autocast():
            losses = self.module(**self.batch, mode="loss")
        loss, _ = self.module.parse_losses(losses)
        loss.backward()
        return loss.detach()
