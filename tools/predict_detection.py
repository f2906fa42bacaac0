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
from torch import Tensor, nn

from linsight.backbones.checkpoint import CheckpointError, check_fit
from linsight.heads.backbone import convert_backbone
from linsight.heads.detection_figures import detections, draw_objects
from linsight.tools.config import tta_of
from linsight.tools.model import Run
from linsight.tools.prediction import Prediction
from linsight.tools.results import Objects

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
        mean, std = detector_scale(model.data_preprocessor)
        self.mean, self.std = mean.tolist(), std.tolist()
        if augmentation:
            model = MODELS.build({**augmentation, "module": model})
        self.model = model.to(device).eval()
        self.names = [*map(str, run.classes or _count(config.model))]
        self.score = score

    def prepare(self, picture: Image.Image) -> Tensor:
        """The image (1, 3, H, W) that the model gets of a picture (RGB)."""
        batch = pseudo_collate([self.pipeline(pipeline_input(picture))])
        return self.model.data_preprocessor(batch, False)["inputs"]

    @torch.inference_mode()
    def predict(self, picture: Image.Image) -> Objects:
        """The objects, the surest first."""
        item = self.pipeline(pipeline_input(picture))
        (sample,) = self.model.test_step(pseudo_collate([item]))
        found = detections(sample, self.score)
        order = np.argsort(-found["scores"], kind="stable")
        ordered: Any = {k: None if value is None else value[order] for k, value in found.items()}
        return Objects(self.names, **ordered)

    def describe(self, picture: Image.Image, result: Objects) -> Prediction:
        """The objects in a picture (RGB) as text, rows and a drawing."""
        return describe(picture, result)

    def __call__(self, picture: Image.Image) -> Prediction:
        return self.describe(picture, self.predict(picture))


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
    state = convert_backbone(run.state, model.backbone)
    check_fit(state, model, f"checkpoint {source} does not fit the model that it names")
    model.load_state_dict(state, strict=False)
    reparameterize_model(model.backbone, inplace=True)
    return model.eval()


def detector_scale(preprocessor: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, by channel, of pixels from 0 to 1 that a detector divides by."""
    if not preprocessor._enable_normalize:
        return torch.zeros(3), torch.full((3,), 1 / 255)
    return preprocessor.mean.flatten() / 255, preprocessor.std.flatten() / 255


def build_pipeline(settings: Sequence[dict]) -> Compose:
    """mmdet's transforms for a picture that is loaded, without those that load it."""
    with DefaultScope.overwrite_default_scope("mmdet"):
        return Compose(list(_drop_loading(settings)))


def pipeline_input(picture: Image.Image) -> dict[str, Any]:
    """A picture (RGB) as mmdet's transforms take it."""
    image = np.asarray(picture)
    shape = image.shape[:2]
    return {
        "img": np.ascontiguousarray(image[..., ::-1]),  # BGR
        "img_id": 0,
        "img_shape": shape,
        "ori_shape": shape,
        "scale_factor": (1.0, 1.0),
    }


def describe(picture: Image.Image, objects: Objects) -> Prediction:
    """The objects in a picture (RGB) as text, rows and a drawing."""
    rows = []
    for i, label in enumerate(objects.labels.tolist()):
        box = (f"{edge:.1f}" for edge in objects.boxes[i])
        pixels = "" if objects.masks is None else int(objects.masks[i].sum())
        rows.append((objects.names[label], f"{objects.scores[i]:.4f}", *box, pixels))
    names = [str(row[0]) for row in rows]
    counts = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return Prediction(
        summary=", ".join(counts) or "nothing",
        rows=rows,
        drawing=draw_objects(
            np.asarray(picture),
            objects.boxes,
            objects.labels,
            objects.scores,
            objects.masks,
            objects.names,
        ),
    )


def _count(model: Mapping) -> range:
    """Numbers for the classes of a detector that names none."""
    heads = [model.get("bbox_head"), (model.get("roi_head") or {}).get("bbox_head")]
    heads = [h for head in heads for h in (head if isinstance(head, list | tuple) else [head])]
    return range(max(head.get("num_classes", 0) for head in heads if head))


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
