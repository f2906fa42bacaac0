"""What can be wrong with the outline or the mask of an object, as COCO's format writes them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

MASK_FAULTS = (
    "without a mask",
    "with polygons of fewer than 3 points",
    "with run lengths of another size than the image's",
)


def mask_fault(annotation: dict, height: int, width: int) -> str | None:
    """What is wrong with the ``segmentation`` of an object in an image of `height` and `width`, or
    None. Polygons of fewer than 3 points are removed from it, in place."""
    mask = annotation.get("segmentation")
    none, polygons, run_lengths = MASK_FAULTS
    if not mask:
        return none
    if isinstance(mask, dict):
        right = list(mask.get("size", ())) == [height, width]
        return None if right and count_pixels(mask.get("counts")) == height * width else run_lengths
    good = [polygon for polygon in mask if _is_polygon(polygon)]
    if len(good) == len(mask):
        return None
    annotation["segmentation"] = good
    return polygons


def _is_polygon(points: Any) -> bool:
    """Whether `points` is a list x, y, x, y, ... of at least 3 points."""
    if not isinstance(points, list) or len(points) < 6 or len(points) % 2:
        return False
    return math.isfinite(sum(points))


def count_pixels(counts: Any) -> int | None:
    """How many pixels run lengths cover, or None where they are malformed.

    pycocotools does not check this, and reads beyond its memory. COCO's compressed form has 5 bits
    per character; bit 5 says that the length goes on in the next character; from the fourth on, a
    length is written as its difference from the last but one.
    """
    if isinstance(counts, list):
        return sum(counts)
    if isinstance(counts, str):
        counts = counts.encode()
    if not isinstance(counts, bytes) or not counts:
        return None
    digits = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((digits & 32) == 0)
    if digits.min() < 0 or digits.max() > 63 or not len(last) or last[-1] != len(digits) - 1:
        return None
    first = np.concatenate(([0], last[:-1] + 1))
    place = np.arange(len(digits)) - np.repeat(first, last - first + 1)
    if place.max() > 6:
        return None
    lengths = np.add.reduceat((digits & 31) << (5 * place), first)
    # Bit 4 of the last digit is the sign.
    lengths -= np.where(digits[last] & 16, 1 << (5 * (place[last] + 1)), 0)
    runs = [lengths[:1], *(np.cumsum(lengths[start::2]) for start in (1, 2))]
    if min(run.min(initial=0) for run in runs) < 0:
        return None
    return int(sum(run.sum() for run in runs))
