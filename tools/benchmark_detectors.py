"""Time a detector of linsight's configs on several backbones, in inference and in training."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
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
from linsight.tools.benchmark_timing import count_machine_codes, elapsed, empty_caches
from linsight.tools.config import load_config

# Iterations of training at changing sizes before the clock starts, and while it runs.
WARM_UP, TIMED = 20, 100
# Height over width of images as they are in COCO, most of which are of a camera's format.
FORMATS = (2 / 3, 3 / 4, 3 / 4, 1, 4 / 3)


def cases(config: str, peers: list[str], shorter: int, batch: int) -> Iterator[Case]:
    """Cases of the detector of a config, on its own backbone and on others.

    Args:
        config: name or path of the config.
        peers: names of models of timm.
        shorter: shorter side of the images in pixels. The longer side is 1333 / 800 times as long,
            as for COCO, and both are padded to multiples of 32.
        batch: number of images.
    """
    size = shorter, _longer(shorter)
    shape = f"{batch} x 3 x {size[0]} x {size[1]}"
    # timm's Swin, for example, makes its masks for one image size.
    padded = tuple(-(-side // 32) * 32 for side in size)
    yield from _cases(config, peers, shorter, batch, shape, img_size=padded)


def multi_scale_cases(config: str, peers: list[str], shorter: int, batch: int) -> Iterator[Case]:
    """Cases of the detector for images of changing sizes; arguments as of `cases`.

    Args:
        config, peers, batch: as of `cases`.
        shorter: the largest shorter side in pixels.
    """
    shape = f"{batch} x 3 x {min(_scales(shorter))}..{shorter}"
    yield from _cases(config, peers, shorter, batch, shape, strict_img_size=False)


def _scales(shorter: int) -> range:
    """Shorter sides in steps of 32 pixels: 480, 512, ... 800 for 800."""
    return range(shorter - shorter * 2 // 5 // 32 * 32, shorter + 1, 32)


def _longer(shorter: int) -> int:
    return round(shorter * 1333 / 800)


def draw_sizes(shorter: int, count: int) -> list[tuple[int, int]]:
    """Heights and widths of images, the same in every run.

    Args:
        shorter: the largest shorter side in pixels. The longer side is at most 1333 / 800 of it.
        count: number of images.
    """
    generator = random.Random(0)
    sizes = []
    for _ in range(count):
        side, ratio = generator.choice(_scales(shorter)), generator.choice(FORMATS)
        longer = min(round(side * max(ratio, 1 / ratio)), _longer(shorter))
        sizes.append((side, longer) if ratio < 1 else (longer, side))
    return sizes


def _cases(
    config: str, peers: list[str], shorter: int, batch: int, shape: str, **fixed: Any
) -> Iterator[Case]:
    """The cases of all backbones; `fixed` are arguments of those that are built for one size."""
    cfg = load_config(config)
    detector = cfg.model.type.removeprefix("Timm")
    for name in (cfg.model.backbone.model_name, *peers):
        own = name == cfg.model.backbone.model_name
        yield Case(
            kind="detectors",
            name=f"{detector} {name}",
            peer_of="" if own else f"{detector} {cfg.model.backbone.model_name}",
            resolution=shorter,
            batch=batch,
            shape=shape,
            build=_builder(cfg.model if own else _replace_backbone(name, cfg.model, fixed)),
        )


def _replace_backbone(name: str, model: Any, fixed: dict[str, Any]) -> ConfigDict:
    """The model on another backbone, with the neck's channels to match."""
    model = model.copy()
    with shapes_only():
        levels = cast(TimmModel, timm.create_model(name)).feature_info
    # A convolutional network may have a finer map before the first stage's.
    chosen = range(len(levels))[-len(model.backbone.get("out_indices", range(4))) :]
    kept = ("type", "output_norm_eps", "drop_path_rate")
    backbone = {key: value for key, value in model.backbone.items() if key in kept}
    if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
        backbone.update(fixed)
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
        size = self.case.resolution, _longer(self.case.resolution)
        self.batch = self.make_batch([size] * self.case.batch)
        self.first_call = elapsed(self._check, self.device)
        self.check = "ok"

    def make_batch(self, sizes: Sequence[tuple[int, int]], first: int = 0) -> dict[str, Any]:
        """Scenes of these sizes, the first of which has the number `first`, on the device."""
        items = []
        for i, size in enumerate(sizes, first):
            scenes = DigitDetection("train", i + 1, [{"type": "PackDetInputs"}], size=size)
            items.append(scenes[i])
        return self.module.data_preprocessor(pseudo_collate(items), self.training)

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


class MultiScaleDetector(Detector):
    """A detector in training on images whose sizes change from one iteration to the next.

    Raises:
        Disagreement: a loss is not finite.
    """

    def prepare(self) -> None:
        count = self.case.batch
        sizes = draw_sizes(self.case.resolution, count * (WARM_UP + TIMED))
        self.batches = [
            self.make_batch(sizes[i : i + count], i) for i in range(0, len(sizes), count)
        ]
        self.batch = self.batches[0]
        self.check = "ok"

    def measure(self, graph: bool = False) -> dict[str, Any]:
        """Images per second, and the machine codes that are compiled, after the first iterations.

        Nothing waits for the device between iterations, so that there is no time of each.
        """
        step = self.make_call()

        def run(batches: Sequence[dict[str, Any]]) -> None:
            for batch in batches:
                self.batch = batch
                step()

        with empty_caches():
            self.first_call = elapsed(step, self.device)
            run(self.batches[1:WARM_UP])
            before = count_machine_codes()
            seconds = elapsed(lambda: run(self.batches[WARM_UP:]), self.device)
            compiled = count_machine_codes() - before
        self._check()
        return self.values((None, None, None), None) | {
            "images_per_second": self.case.batch * TIMED / seconds,
            "compiled": compiled,
        }
