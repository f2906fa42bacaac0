"""What the objects in a user's images ask of a detector: crops, anchors, and room for crowds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from linsight.data.boxes import box_fault
from linsight.data.sources import Source, image_size

# COCO calls objects whose side is shorter than this small.
SMALL = 32
# Of an image COCO's mean precision over several overlaps counts so many objects, the surest.
COUNTED = 100
# An epoch of crops has so many, however few the images are.
CROPS = 256


@dataclass(frozen=True)
class Objects:
    """How large and how many the objects of a detection data set are.

    Attributes:
        sides: float (N,), the root of the area of each training object's box, in pixels.
        scales: float (N,), the shorter side of the image that each of them lies in, in pixels.
        pixels: the mean number of pixels of the training images.
        most: the largest number of objects in an image of any split.
    """

    sides: np.ndarray
    scales: np.ndarray
    pixels: float
    most: int

    @classmethod
    def of(cls, source: Source) -> Objects:
        """Measure the objects of a user's data."""
        sides, scales, areas = [], [], []
        for sample in source.splits["train"]:
            size = sample.size or image_size(sample.file)
            areas.append(math.prod(size))
            for thing in sample.label:
                if box_fault(thing["bbox"], *size) is None and not thing.get("iscrowd"):
                    width, height = map(float, thing["bbox"][2:])
                    sides.append(math.sqrt(width * height))
                    scales.append(min(size))
        most = max(len(sample.label) for found in source.splits.values() for sample in found)
        return cls(np.array(sides), np.array(scales), float(np.mean(areas)), most)

    def resized(self, size: int) -> np.ndarray:
        """The sides of the objects where the shorter sides of all images become `size`."""
        return self.sides * size / self.scales

    def crop(self, size: int) -> int | None:
        """The side of the crops to train on, or None where whole images are better.

        Crops are better where most objects would become small if the shorter sides of the images
        became `size`, and would be larger if these stayed as they are.
        """
        if not len(self.sides):
            return None
        side, resized = np.median(self.sides), np.median(self.resized(size))
        if resized >= SMALL or resized >= side:
            return None
        return min(800, max(256, 32 * round(float(side) / 2)))

    def repeats(self, crop: int, images: int) -> int:
        """How often an epoch takes a crop of each image: until the crops cover them."""
        return math.ceil(max(self.pixels / crop**2, CROPS / images))

    def anchor(self, sides: np.ndarray) -> float:
        """The side of the smallest anchors that fit objects of these sides: 32, as for COCO, or
        less where a tenth of them are smaller, but 8 pixels at least."""
        return float(np.clip(np.quantile(sides, 0.1), 8, 32)) if len(sides) else 32.0

    @property
    def kept(self) -> int:
        """How many objects of an image are kept: as for COCO, or half as many again as the most
        crowded image has."""
        return max(COUNTED, 100 * math.ceil(1.5 * self.most / 100))

    def adapt(self, model: dict[str, Any], sides: np.ndarray) -> None:
        """Set anchors and the numbers of objects of mmdet's RetinaNet or Mask R-CNN, in place.

        Args:
            model: the detector's config.
            sides: of the objects as the detector sees them, in pixels.
        """
        anchor, tests = self.anchor(sides), model["test_cfg"]
        if "rcnn" in tests:
            generator = model["rpn_head"]["anchor_generator"]
            generator["scales"] = [round(anchor / generator["strides"][0], 2)]
            tests["rcnn"]["max_per_img"] = self.kept
            for key in ("nms_pre", "max_per_img"):
                tests["rpn"][key] = max(tests["rpn"][key], 10 * self.kept)
            return
        generator = model["bbox_head"]["anchor_generator"]
        generator["octave_base_scale"] = round(anchor / generator["strides"][0], 2)
        tests["max_per_img"] = self.kept
        tests["nms_pre"] = max(tests["nms_pre"], 10 * self.kept)
