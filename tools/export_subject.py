"""What `linsight export` writes for other programs: a model of any task, with its description."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.utils import reparameterize_model
from torch import Tensor, nn

import linsight
from linsight.backbones import ZOO
from linsight.backbones.checkpoint import CheckpointError, TimmModel
from linsight.data.digits import digit_scene
from linsight.data.mask_transforms import build_transforms
from linsight.heads.deployment import DeployedClassifier, DeployedSegmentor
from linsight.tools.config import ConfigError, quiet_mmdet
from linsight.tools.model import Run, class_names, open_model, read_run

# Of which an image is drawn to trace a detector whose config resizes no images.
_SIDES = (128, 160)


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Subject:
    """A model, ready to be written for other programs.

    Attributes:
        module: takes ``images``, uint8 (B, channels, H, W), and returns tensors by name.
        task: "classification", "segmentation" or "detection".
        name: timm's name of the backbone.
        size: height and width of the images that it is traced with.
        channels: channels of its images, 3 of which are RGB.
        least: the smallest side of an image that it takes.
        one_size: why its images have this size alone; "" where others may be possible.
        description: what the file says of itself, as JSON has it.
        outputs: names of what it returns.
        device: where the module and its images lie.
        batch: the number of images that it is traced for, None for any number.
    """

    module: nn.Module
    task: str
    name: str
    size: tuple[int, int]
    channels: int
    least: int
    one_size: str
    description: dict[str, Any]
    outputs: tuple[str, ...]
    device: torch.device = CPU
    batch: int | None = None

    def with_size(self, size: tuple[int, int]) -> Subject:
        """This model for images of one size alone.

        Raises:
            CheckpointError: it takes none of this size, as timm's Swin does not.
        """
        try:
            with torch.no_grad():
                self.run(torch.zeros(1, self.channels, *size, dtype=torch.uint8))
        except (AssertionError, RuntimeError, ValueError) as error:
            height, width = size
            raise CheckpointError(
                f"--size is {height}x{width}, which {self.name} does not take: {error}"
            ) from error
        return replace(self, size=size, one_size="as it was asked for")

    def for_gpu(self, batch: int) -> Subject:
        """This model on the GPU, for batches of one length of images of one size alone.

        The kernels' grids are numbers in a compiled program, and both decide them.
        """
        device = torch.device("cuda")
        description = self.description | {"device": device.type, "batch": batch}
        return replace(
            self,
            module=self.module.to(device),
            description=description,
            device=device,
            batch=batch,
            one_size=f"in batches of {batch}, which a package for a GPU is compiled for",
        )

    def run(self, images: Tensor) -> dict[str, Tensor]:
        """What the model returns for images on the CPU, there."""
        outputs = self.module(images.to(self.device))
        return {name: x.cpu() for name, x in outputs.items()}


def open_subject(source: str, model_name: str | None = None, onnx: bool = False) -> Subject:
    """Open a trained model of any task for export.

    Args:
        source, model_name: as :func:`~linsight.tools.predict.open_predictor` takes them.
        onnx: whether the model is for ONNX, which has an operator of its own for non-maximum
            suppression.

    Raises:
        CheckpointError, FileNotFoundError, ConfigError: as `open_predictor` raises them.
        CheckpointError: the model predicts in a way that no graph has.
    """
    run = read_run(source, model_name)
    if run is None or run.config.model.type == "ImageClassifier":
        return classifier_subject(open_model(source, model_name))
    return dense_subject(run, source, onnx)


def dense_subject(run: Run, source: str, onnx: bool = False) -> Subject:
    """A segmentor or detector, of the content of its checkpoint `source`; see `open_subject`."""
    if run.config.get("default_scope") == "mmdet":
        with quiet_mmdet():
            return _open_detector(run, source, onnx)
    if run.config.model.type == "SemanticSegmentor":
        return _open_segmentor(run, source)
    raise CheckpointError(f"{source} is of a {run.config.model.type}, which cannot be exported")


def classifier_subject(model: TimmModel) -> Subject:
    """A classifier of timm, with its constants folded."""
    preparation = timm.data.resolve_model_data_config(model)
    channels, height, width = preparation["input_size"]
    mean, std = preparation["mean"], preparation["std"]
    module = DeployedClassifier(reparameterize_model(model), mean, std).eval()
    return _subject(
        module,
        "classification",
        model,
        (channels, height, width),
        coarsest(model, [len(model.feature_info) - 1]),
        class_names(model),
        mean,
        std,
        {key: _plain(value) for key, value in preparation.items()},
        ("logits",),
    )


def _open_segmentor(run: Run, source: str) -> Subject:
    from linsight.tools.predict_segmentation import build_segmentor

    run.config.model.graph = False
    segmentor = build_segmentor(run, source)
    dataset = run.config.test_dataloader.dataset
    mean = dataset.get("mean", IMAGENET_DEFAULT_MEAN)
    std = dataset.get("std", IMAGENET_DEFAULT_STD)
    transforms = _plain(dataset.get("transforms", ()))
    side = dataset.get("size", 512)
    size = (side, side) if isinstance(side, int) else tuple(side)
    preparation = {"transforms": transforms}
    if segmentor.window:
        size = tuple(segmentor.window)
        preparation |= {"window": size, "window_stride": tuple(segmentor.window_stride)}
    backbone = segmentor.backbone
    return _subject(
        DeployedSegmentor(segmentor, mean, std).eval(),
        "segmentation",
        backbone.model,
        (3, *size),
        max(*backbone.out_strides, *getattr(segmentor.neck, "strides", ())),
        run.classes or list(map(str, range(segmentor.num_classes))),
        mean,
        std,
        _plain(preparation),
        ("labels", "logits"),
    )


def _open_detector(run: Run, source: str, onnx: bool) -> Subject:
    from linsight.heads.deployment_detection import DeployedDetector
    from linsight.tools.predict_detection import build_detector

    detector: Any = build_detector(run, source)
    try:
        if onnx:
            from linsight.tools.export_onnx import suppress

            module = DeployedDetector(detector, suppress)
        else:
            module = DeployedDetector(detector)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    pipeline = _plain(run.config.test_dataloader.dataset.pipeline)
    size = _SIDES
    for step in pipeline:
        if step["type"].endswith("Resize") and "scale" in step:
            size = tuple(sorted(step["scale"]))  # mmdet's scales are sides in any order
    module = module.eval()
    normalize = module.normalize
    mean, std = ((x.flatten() / 255).tolist() for x in (normalize.mean, normalize.std))
    masks = bool(getattr(detector, "with_mask", False))
    head = detector.roi_head if hasattr(detector, "roi_head") else detector
    stride: Any = module.stride
    head: Any = head.bbox_head[-1] if isinstance(head.bbox_head, nn.ModuleList) else head.bbox_head
    return _subject(
        module,
        "detection",
        detector.backbone.model,
        (3, *size),
        stride,
        run.classes or list(map(str, range(head.num_classes))),
        mean[::-1] if normalize.to_bgr else mean,
        std[::-1] if normalize.to_bgr else std,
        {"pipeline": pipeline},
        ("boxes", "labels", "scores", "masks")[: 3 + masks],
    )


def _subject(
    module: nn.Module,
    task: str,
    backbone: TimmModel,
    shape: tuple[int, ...],
    stride: int,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    preparation: dict[str, Any],
    outputs: tuple[str, ...],
) -> Subject:
    name = backbone.pretrained_cfg["architecture"]
    channels, height, width = shape
    colours = "uint8 RGB" if channels == 3 else "uint8"
    description = {
        "linsight_version": linsight.__version__,
        "task": task,
        "backbone": name,
        "classes": list(classes),
        "inputs": {
            "images": f"{colours} (batch, {channels}, height, width), resized, not normalised"
        },
        "outputs": list(outputs),
        "mean": list(map(float, mean)),
        "std": list(map(float, std)),
        "preparation": preparation,
        # A map of one row or column would be taken for a constant.
        "smallest_side": stride + 1,
    }
    return Subject(
        module,
        task,
        name,
        size=(height, width),
        channels=channels,
        least=stride + 1,
        one_size="" if name in ZOO else f"{name} is not of this library; --size gives another",
        description=description,
        outputs=outputs,
    )


def coarsest(model: TimmModel, levels: Sequence[int]) -> int:
    """The stride of a model's coarsest map."""
    return max(int(model.feature_info[level]["reduction"]) for level in levels)


def _plain(value: Any) -> Any:
    """A config's value as JSON has it."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"the preparation of images has {value!r}, which no file can describe")


def _with_tuples(value: Any) -> Any:
    """A value out of JSON, with tuples for lists of numbers: mmcv takes no list for a size."""
    if isinstance(value, dict):
        return {key: _with_tuples(each) for key, each in value.items()}
    if isinstance(value, list):
        numbers = value and all(isinstance(each, int | float) for each in value)
        return tuple(value) if numbers else [_with_tuples(each) for each in value]
    return value


# Pictures.


def photographs() -> list[Image.Image]:
    """Real pictures to compare models on: photographs that scikit-learn and scikit-image bring, and
    a scene of handwritten digits."""
    from sklearn.datasets import load_sample_images

    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    scene = digit_scene(0, "test", size=(128, 160), digits=(3, 6), digit_size=(0.2, 0.45))
    pictures.insert(1, Image.fromarray(scene.image))
    try:
        from skimage import data
    except ModuleNotFoundError:
        return pictures
    return [*pictures, Image.fromarray(data.astronaut()), Image.fromarray(data.chelsea())]


def batch_of(pictures: Sequence[Image.Image], size: tuple[int, int], channels: int = 3) -> Tensor:
    """The pictures as uint8 images (B, channels, H, W) of a size (height, width).

    Channels other than three are red, green and blue in turn.
    """
    height, width = size
    resized = [
        picture.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        for picture in pictures
    ]
    images = torch.from_numpy(np.stack([np.asarray(each) for each in resized]))
    return images.movedim(-1, 1)[:, torch.arange(channels) % 3]


def batches_for(
    subject: Subject, any_size: bool, pictures: Sequence[Image.Image] | None = None
) -> list[Tensor]:
    """The batches to compare a file on: one image, and three at another, non-square size."""
    pictures = list(pictures or photographs())
    pictures = [pictures[i % len(pictures)] for i in range(max(3, len(pictures)))]
    height, width = subject.size
    if any_size:
        height, width = (max(subject.least, side) for side in (height * 3 // 4 + 1, width + 13))
    # Three by three, so that a batch of large images fits into memory.
    rest = [pictures[i : i + 3] for i in range(0, len(pictures), 3)]
    return [
        batch_of(pictures[:1], subject.size, subject.channels),
        *(batch_of(part, (height, width), subject.channels) for part in rest),
    ]


def preparation_of(description: dict[str, Any]) -> Callable[[Image.Image], Any]:
    """The function that resizes a picture as the model in a file wants it.

    Returns:
        A function of a picture that gives uint8 (3, H, W), and in detection the factors (x, y) by
        which it was resized.
    """
    settings = description["preparation"]
    if description["task"] == "classification":
        from torchvision.transforms import Compose, PILToTensor

        from linsight.tools.predict_classification import mode_of

        steps: Any = timm.data.create_transform(**settings)
        # What precedes the normalisation, which is in the file.
        made = ("MaybeToTensor", "ToTensor", "Normalize")
        steps = [step for step in steps.transforms if type(step).__name__ not in made]
        resize = Compose([*steps, PILToTensor()])
        mode = mode_of(settings["input_size"][0])
        return lambda picture: resize(picture.convert(mode))
    if description["task"] == "segmentation":
        from torchvision.transforms.v2.functional import to_image

        transforms = build_transforms(settings["transforms"])
        return lambda picture: transforms(to_image(picture))
    with quiet_mmdet():
        from linsight.tools.predict_detection import build_pipeline, pipeline_input

    pipeline = build_pipeline(_with_tuples(settings["pipeline"]))

    def prepare(picture: Image.Image) -> tuple[Tensor, tuple[float, float]]:
        item: Any = pipeline(pipeline_input(picture))
        scale = item["data_samples"].metainfo.get("scale_factor", (1.0, 1.0))
        return item["inputs"].flip(0), tuple(scale)

    return prepare
