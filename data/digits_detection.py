"""Digit scenes for mmdet: boxes, classes and masks, drawn on the fly.

In a config: ``custom_imports = dict(imports=["linsight.data.digits_detection"])``,
then ``dataset=dict(type="DigitDetection", split="train", pipeline=[dict(type="PackDetInputs")])``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import linsight.kernels.mmcv_operators  # noqa: F401  has to come before mmdet

# isort: split
import numpy as np
from mmcv.transforms import Compose
from mmdet.registry import TRANSFORMS
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from mmengine.registry import DATASETS
from pycocotools import mask as run_length
from torch.utils.data import Dataset

from .digits import CLASSES, DETECTION, Split, digit_scene, scene_count, scene_of


@DATASETS.register_module()
class DigitDetection(Dataset):
    """Scenes of several digits for detection and instance segmentation.

    An item is the result of the pipeline, which gets what ``LoadImageFromFile`` and
    ``LoadAnnotations`` would give it. With ``"instances"`` among the ``meta_keys`` of
    ``PackDetInputs``, ``CocoMetric`` needs no annotation file.

    Args:
        split: ``"train"`` or ``"test"``, which share no handwriting.
        length: number of scenes.
        pipeline: mmdet's transforms after loading.
        **scene: arguments of :func:`~linsight.data.digits.digit_scene` that differ from
            :data:`~linsight.data.digits.DETECTION`.
    """

    def __init__(self, split: Split, length: int, pipeline: Sequence[dict], **scene: Any) -> None:
        self.length = scene_count(split, length)
        self.pipeline: Any = Compose([TRANSFORMS.build(step) for step in pipeline])
        self.scene = functools.partial(digit_scene, split=split, **{**DETECTION, **scene})
        self.scene(0)  # raises the error of a wrong argument here instead of in a worker
        self.metainfo = {"classes": CLASSES}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = scene_of(self, index)
        shape = scene.semantic.shape
        return self.pipeline(
            {
                "img": np.ascontiguousarray(scene.image[..., ::-1]),  # OpenCV's order, BGR
                "img_id": index,
                "img_shape": shape,
                "ori_shape": shape,
                "scale_factor": (1.0, 1.0),
                "height": shape[0],
                "width": shape[1],
                "gt_bboxes": HorizontalBoxes(scene.boxes),
                "gt_bboxes_labels": scene.labels,
                "gt_ignore_flags": np.zeros(len(scene.labels), bool),
                "gt_masks": BitmapMasks(scene.masks.astype(np.uint8), *shape),
                "instances": [
                    {
                        "bbox": box.tolist(),
                        "bbox_label": int(label),
                        "ignore_flag": 0,
                        "mask": run_length.encode(np.asfortranarray(mask, np.uint8)),
                    }
                    for box, label, mask in zip(scene.boxes, scene.labels, scene.masks, strict=True)
                ],
            }
        )
