"""Time a detector of linsight's configs on several backbones, in inference and in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import timm
import torch
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.registry import DefaultScope
from torch import nn

from linsight.datasets.digits_detection import DigitDetection
from linsight.tools.benchmark_cases import Case
from linsight.tools.benchmark_measure import Disagreement
from linsight.tools.benchmark_timing import elapsed, peak_memory, quantiles
from linsight.tools.config import load_config


def cases(config: str, peers: list[str], shorter: int, batch: int) -> Iterator[Case]:
    """The detector of a config, and the same detector on other backbones.

    Args:
        config: name or path.
        peers: models of timm.
        shorter: side of the images in pixels; the longer is COCO's 1333 to 800 of it, and both
            are padded to multiples of 32.
        batch: images.
    """
    size = shorter, round(shorter * 1333 / 800)
    cfg = load_config(config)
    padded = tuple(-(-side // 32) * 32 for side in size)
    for name in (cfg.model.backbone.model_name, *peers):
        own = name == cfg.model.backbone.model_name
        yield Case(
            kind="detectors",
            name=f"{cfg.model.type} {name}",
            peer_of="" if own else f"{cfg.model.type} {cfg.model.backbone.model_name}",
            resolution=shorter,
            batch=batch,
            shape=f"{batch} x 3 x {size[0]} x {size[1]}",
            build=_builder(cfg.model if own else _on(name, cfg.model, padded)),
        )


def _on(name: str, model: ConfigDict, size: tuple[int, int]) -> ConfigDict:
    """The model on another backbone, with its number of channels."""
    model = model.copy()
    kept = ("type", "out_indices", "output_norm_eps", "drop_path_rate")
    backbone = {key: value for key, value in model.backbone.items() if key in kept}
    # Such as timm's Swin, which makes its masks for one size of image.
    if timm.get_pretrained_cfg(name).fixed_input_size:
        backbone["img_size"] = size
    model.backbone = {**backbone, "model_name": name}
    with torch.device("meta"):
        levels = timm.create_model(name).feature_info
    chosen = backbone.get("out_indices", range(len(levels)))
    model.neck = {**model.neck, "in_channels": [levels[i]["num_chs"] for i in chosen]}
    return model


def _builder(model: ConfigDict) -> Callable[[torch.device], nn.Module]:
    def build(device: torch.device) -> nn.Module:
        cfg = model.copy()
        cfg.backbone = {**cfg.backbone, "pretrained": False}
        with DefaultScope.overwrite_default_scope("mmdet"):
            return MODELS.build(cfg)

    return build


class Detector:
    """A detector under autocast on digit scenes, whose digits give it targets.

    Nothing is trained before: in inference the regions are proposed and classified, but hardly
    an object is found, so few masks are made.

    Attributes:
        check: 'ok': the losses, or scores, are finite. Regions are sampled at random, so that
            they cannot be compared with exact arithmetic.
        first_call: seconds of the first call, with what it compiled.

    Raises:
        Disagreement: they are not finite.
    """

    check = "ok"

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype,
        device: torch.device,
        compile: bool,
        seconds: float,
        phase: str,
    ) -> None:
        self.case, self.dtype, self.device, self.seconds = case, dtype, device, seconds
        self.training = phase == "training"
        self.module = case.build(device).to(device).train(self.training)
        if compile:
            torch.compiler.reset()
            self.module.backbone.compile(dynamic=False)
        size = tuple(int(side) for side in case.shape.split(" x ")[2:])
        scenes = DigitDetection("train", case.batch, [{"type": "PackDetInputs"}], size=size)
        batch = pseudo_collate([scenes[i] for i in range(case.batch)])
        self.batch = self.module.data_preprocessor(batch, self.training)
        self.first_call = elapsed(self._check, device)

    def _check(self) -> None:
        result = self._backward() if self.training else self._infer()
        values = [result] if self.training else [x.pred_instances.scores for x in result]
        if not all(value.isfinite().all() for value in values):
            raise Disagreement("the result is not finite")

    def _autocast(self) -> Any:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @torch.inference_mode()
    def _infer(self) -> list:
        with self._autocast():
            return self.module(**self.batch, mode="predict")

    def _backward(self) -> torch.Tensor:
        with self._autocast():
            losses = self.module(**self.batch, mode="loss")
        loss, _ = self.module.parse_losses(losses)
        loss.backward()
        return loss.detach()

    def measure(self) -> dict[str, Any]:
        """Time and memory of inference, or of a training step with AdamW."""
        call: Callable[[], Any] = self._infer
        if self.training:
            parameters = [p for p in self.module.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.05)

            def call() -> None:
                self._backward()
                optimizer.step()
                optimizer.zero_grad()

            call()  # from the second step on the optimiser holds its moments
        peak = peak_memory(call, self.device)
        times = quantiles(call, self.device, self.seconds)
        return {
            **dict(zip(("p20_ms", "p50_ms", "p80_ms"), times, strict=True)),
            "peak_mib": peak,
            "first_call_s": self.first_call,
            "check": self.check,
            "images_per_second": 1e3 * self.case.batch / times[1],
        }
