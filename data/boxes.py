"""What can be wrong with the box x, y, w, h of an object, whatever file it comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

SMALL = "with a box less than a pixel wide or high"
OUTSIDE = "with a box outside the image"


def box_fault(box: Any, width: int, height: int, shortest: float = 0) -> str | None:
    """What is wrong with a box in an image of `width` and `height`, or None.

    Args:
        box: x, y, w, h in pixels.
        width, height: of the image.
        shortest: sides below this many pixels are a fault.
    """
    try:
        x, y, w, h = box
        finite = math.isfinite(x + y + w + h)
    except (TypeError, ValueError):
        return "with a box that is not four numbers"
    if not finite:
        return "with a box that is not finite"
    if w <= 0 or h <= 0:
        return "with a box without width or height"
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return OUTSIDE
    if min(w, h) < shortest:
        return SMALL
    return None


def reaches_beyond(box: Sequence[float], width: int, height: int) -> bool:
    """Whether a right box reaches beyond the edges of its image."""
    x, y, w, h = box
    # Rounding leaves boxes that end a pixel beyond the edge.
    return min(x, y) < -2 or x + w > width + 2 or y + h > height + 2


def look_like_corners(boxes: Sequence[Sequence[float]], sizes: Sequence[tuple[int, int]]) -> bool:
    """Whether boxes x, y, w, h of images of (width, height) are rather x1, y1, x2, y2."""
    return all(
        0 <= x < w <= width + 1 and 0 <= y < h <= height + 1
        for (x, y, w, h), (width, height) in zip(boxes, sizes, strict=True)
    )
