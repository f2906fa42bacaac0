"""Detection in pictures for `linsight predict`: boxes, classes and, for some detectors, masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config

# Registers what the configs of detectors name; mmdet follows them.
import linsight.data.coco
import linsight.data.digits_detection
import linsight.heads.detection  # noqa: F401

# isort: split
import numpy as np
import torch
from mmcv.transforms import Compose
from mmdet.registry import MODELS
from mmengine.dataset import pseudo_collate
from mmengine.registry import DefaultScope
from PIL import Image
from timm.utils import reparameterize_model
from torch import nn

from linsight.backbones.checkpoint import CheckpointError, check_fit
from linsight.heads.detection_figures import detections, draw_objects
from linsight.tools.config import tta_of
from linsight.tools.model import Run
from linsight.tools.prediction import Prediction

_LIBRARIES = ("linsight", "mmdet", "mmengine")


class DetectionPredictor:
    """Predicts the boxes, classes and, for some detectors, masks of the objects in a picture.

    Args:
        run: content of the checkpoint of one of mmdet's detectors.
        source: file of the checkpoint, for messages.
        device: device to run it on.
        score: lowest score of the objects that are reported.
        tta: use the test-time augmentation of the config.

    Raises:
        CheckpointError: the weights do not fit the model that the checkpoint names, or it names
            a type of another library than linsight, mmdet and mmengine.
        ConfigError: the config has no test-time augmentation.
    """

    columns = ("class", "score", "left", "top", "right", "bottom", "mask_pixels")

    def __init__(
        self, run: Run, source: str, device: torch.device, score: float, tta: bool = False
    ) -> None:
        config = run.config
        augmentation = tta_of(config) if tta else None
        model: Any = build_detector(run, source)
        pipeline = config.tta_pipeline if tta else config.test_dataloader.dataset.pipeline
        self.pipeline = build_pipeline(pipeline)
        if augmentation:
            model = MODELS.build({**augmentation, "module": model})
        self.model = model.to(device).eval()
        self.names = run.classes
        self.score = score

    @torch.inference_mode()
    def __call__(self, picture: Image.Image) -> Prediction:
        item = self.pipeline(unprepared(picture))
        (sample,) = self.model.test_step(pseudo_collate([item]))
        return describe_objects(picture, detections(sample, self.score), self.names)


def describe_objects(
    picture: Image.Image, objects: Mapping[str, Any], names: Sequence[str] | None
) -> Prediction:
    """The prediction of a detector for a picture.

    Args:
        picture: the picture (RGB).
        objects: ``boxes``, ``labels``, ``scores`` and ``masks``, as
            :func:`~linsight.heads.detection_figures.draw_objects` takes them.
        names: names of the classes.
    """
    masks = objects["masks"]
    rows = []
    for i in np.argsort(-objects["scores"], kind="stable"):
        label = int(objects["labels"][i])
        name = names[label] if names else label
        box = (f"{edge:.1f}" for edge in objects["boxes"][i])
        pixels = "" if masks is None else int(masks[i].sum())
        rows.append((name, f"{objects['scores'][i]:.4f}", *box, pixels))
    found = [str(row[0]) for row in rows]
    counts = [f"{found.count(name)} x {name}" for name in dict.fromkeys(found)]
    return Prediction(
        summary=", ".join(counts) or "nothing",
        rows=rows,
        drawing=draw_objects(np.asarray(picture), **objects, names=names),
    )


def build_detector(run: Run, source: str) -> nn.Module:
    """The detector of a checkpoint, in evaluation mode, its backbone's constants folded.

    Raises:
        CheckpointError: the weights do not fit the model that the checkpoint names, or it names
            a type of another library than linsight, mmdet and mmengine.
    """
    config = run.config
    _check_libraries(config, source)
    # The checkpoint holds the weights, so that nothing is downloaded or read from other files.
    config.model.backbone.update(pretrained=False, checkpoint=None)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(config.model)
    check_fit(run.state, model, f"checkpoint {source} does not fit the model that it names")
    model.load_state_dict(run.state, strict=False)
    reparameterize_model(model.backbone, inplace=True)
    return model.eval()


def build_pipeline(settings: Sequence[Mapping[str, Any]]) -> Compose:
    """mmdet's transforms for a picture that is loaded, without those that load it."""
    with DefaultScope.overwrite_default_scope("mmdet"):
        return Compose(list(_drop_loading(settings)))


def unprepared(picture: Image.Image) -> dict[str, Any]:
    """What mmdet's transforms take of a picture."""
    image = np.asarray(picture)
    shape = image.shape[:2]
    return {
        "img": np.ascontiguousarray(image[..., ::-1]),  # BGR
        "img_id": 0,
        "img_shape": shape,
        "ori_shape": shape,
        "scale_factor": (1.0, 1.0),
    }


def _drop_loading(pipeline: Sequence[dict]) -> Iterator[dict]:
    """The transforms of a pipeline without those that load the picture and its annotations."""
    for step in pipeline:
        if step["type"] == "TestTimeAug":
            branches = [list(_drop_loading(branch)) for branch in step["transforms"]]
            yield {**step, "transforms": [branch for branch in branches if branch]}
        elif not step["type"].startswith("Load"):
            yield step


def _check_libraries(config: Config | Mapping, source: str) -> None:
    """Refuse types of other libraries: a checkpoint may come from anywhere, and mmengine would
    call whatever function a type names.

    Raises:
        CheckpointError: a type is of another library.
    """
    for kind in _types([config["model"], config["test_dataloader"], config.get("tta_model", {})]):
        library = str(kind).rpartition(".")[0]
        if library and library not in _LIBRARIES:
            raise CheckpointError(
                f"checkpoint {source} names {kind}, which is not of {', '.join(_LIBRARIES)}"
            )


def _types(node: Any) -> Iterator[Any]:
    if isinstance(node, Mapping):
        if "type" in node:
            yield node["type"]
        node = list(node.values())
    if isinstance(node, list | tuple):
        for value in node:
            yield from _types(value)
