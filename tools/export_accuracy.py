"""Metrics of a deployed model on the test data of its training, for what eight bits cost."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any, cast

import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings
from rich.progress import Progress
from torch import Tensor

from linsight.heads.decode_head import resize

Named = dict[str, Tensor]


@torch.inference_mode()
def measure(
    run: Callable[[Tensor], Named], task: str, config: Config, progress: Progress, name: str
) -> dict[str, float]:
    """The metrics of a model on its config's test data.

    Args:
        run: gives tensors by name, of uint8 images (B, channels, H, W), as `linsight export`
            writes them.
        task: "classification", "segmentation" or "detection".
        config: of the training, with ``test_dataloader`` and ``test_evaluator``.
        progress: where a bar shows how far it has come.
        name: what the bar is called.
    """
    import_modules_from_strings(**config.custom_imports)
    with DefaultScope.overwrite_default_scope(config.get("default_scope") or "mmengine"):
        settings = dict(config.test_dataloader)
        loader = Runner.build_dataloader(settings, seed=0)
        evaluator = Evaluator(config.test_evaluator)
    dataset: Any = loader.dataset
    evaluator.dataset_meta = dataset.metainfo
    predict = {"classification": _classify, "segmentation": _segment, "detection": _detect}[task]
    for batch in progress.track(loader, description=name):
        evaluator.process(predict(run, batch, dataset.metainfo), batch)
    with redirect_stdout(io.StringIO()):  # tables of each class
        return cast(dict[str, float], evaluator.evaluate(len(dataset)))


def _pixels(images: Tensor, meta: dict[str, Any]) -> Tensor:
    """The pixels of images (B, C, H, W) that a data set has normalised."""
    mean, std = (torch.tensor(meta[key])[:, None, None] for key in ("mean", "std"))
    return (255 * (images * std + mean)).round().clamp(0, 255).byte()


def _classify(run: Callable[[Tensor], Named], batch: Any, meta: dict[str, Any]) -> list[Any]:
    logits = run(_pixels(batch[0], meta))["logits"]
    return [{"scores": scores} for scores in logits.softmax(-1)]


def _segment(run: Callable[[Tensor], Named], batch: Any, meta: dict[str, Any]) -> list[Any]:
    images, labels = batch[0], batch[1]
    found = run(_pixels(images, meta))["logits"]
    return [{"labels": x} for x in resize(found, labels.shape[-2:]).argmax(1)]


def _detect(run: Callable[[Tensor], Named], batch: Any, meta: dict[str, Any]) -> list[Any]:
    from mmengine.structures import InstanceData

    samples = []
    for image, sample in zip(batch["inputs"], batch["data_samples"], strict=True):
        outputs = run(image.flip(0)[None].contiguous())  # mmdet's images are BGR
        there = outputs["labels"][0] >= 0
        found = {name: value[0][there] for name, value in outputs.items()}
        height, width = sample.ori_shape
        scale = torch.tensor(sample.metainfo.get("scale_factor", (1.0, 1.0)))
        objects = InstanceData(
            bboxes=found["boxes"] / scale.repeat(2),
            scores=found["scores"],
            labels=found["labels"].long(),
        )
        if "masks" in found:
            masks = found["masks"][None].float()
            objects.masks = resize(masks, (height, width))[0] >= 0.5
        sample.pred_instances = objects
        samples.append(sample.to_dict())
    return samples
