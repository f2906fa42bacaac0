"""Scenes composed of the 1,797 real handwritten digits that scikit-learn ships.

One seeded generator, :func:`digit_scene`, gives the image together with its class labels,
boxes, instance masks and semantic mask, so that classification, detection and segmentation
train on any machine with no download::

    scene = digit_scene(0, "train", size=(192, 256), digits=(2, 6), digit_size=(0.2, 0.4))

A scene is a function of its arguments alone. Index 0, 1, 2, ... never ends and never
repeats, so a longer training set is only a larger ``length``.

**Whose handwriting is in which split.** scikit-learn's digits are the test part of UCI's
optdigits, whose documentation says that 13 people wrote it, and no more: the writer of a
digit is not recorded. The order tells more. The labels run 14 times through one fixed
sequence of 130 digits (``0123456789 0123456789 0123456789 09565...``), a few lost each time:
14 filled-in forms, one after the other, which :data:`FORM_STARTS` marks. The test split is
the last three forms (382 digits), the training split the eleven before them (1,415). So no
form, and no digit image, is in both. That no *writer* is in both is likely, not certain: 14
forms by 13 people make one person the writer of two, and nothing says which two. Judged by
the distances between equal digits, they are the tenth and the eleventh, both in training.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

Split = Literal["train", "test"]

CLASSES = tuple("0123456789")

#: Where each of the 14 forms begins among scikit-learn's digits.
FORM_STARTS = (0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667)
_SPLITS = {"train": slice(0, 1415), "test": slice(1415, 1797)}

IGNORE_INDEX = 255

_MARGIN = 0.5  # Cells kept around the 8x8, where the smoothed strokes fade out.
_PADDING = 2  # Cells of paper around a digit in the atlas: the cubic kernel's reach.
_OVERSAMPLING = 4  # Atlas pixels per cell.
_SMALLEST_DIGIT = 8  # Pixels: below one per cell the strokes fall apart.
_VISIBLE = 0.6  # Of a digit's pixels, at least this share is never covered by later digits.
_TRIES = 24
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Scene:
    """A picture and everything that is known about it, for N digits in reading of depth.

    Later digits lie on top of earlier ones; masks hold the visible pixels only.

    Attributes:
        image: uint8 (H, W, 3), RGB.
        labels: int64 (N,), the digits 0..9.
        boxes: float32 (N, 4), x1 y1 x2 y2 in pixels, the tight bounds of the masks: x2 and
            y2 are the last pixel's plus one.
        masks: bool (N, H, W), disjoint, none empty.
        semantic: uint8 (H, W), 0 for background and digit + 1 (1..10) on a digit.
            255 is the ignore index; no pixel of a scene has it.
    """

    image: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray
    semantic: np.ndarray


@functools.cache
def load_split(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The handwriting of a split, as scikit-learn holds it.

    Returns:
        Images, uint8 (n, 8, 8) with ink from 0 to 16, and labels, int64 (n,). ``n`` is
        1,415 for ``"train"`` and 382 for ``"test"``.

    Raises:
        ValueError: the split is neither.
        ImportError: scikit-learn is not installed.
    """
    if split not in _SPLITS:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is not installed: "
            "pip install 'linsight[train]'"
        ) from error
    digits = load_digits()
    part = _SPLITS[split]
    return digits.images[part].astype(np.uint8), digits.target[part].astype(np.int64)


def digit_scene(
    index: int,
    split: Split = "train",
    *,
    seed: int = 0,
    size: int | tuple[int, int] = 64,
    digits: int | tuple[int, int] = 1,
    digit_size: tuple[float, float] = (0.55, 0.9),
    max_overlap: float = 0.05,
    clutter: int = 4,
    noise: float = 0.04,
) -> Scene:
    """Compose scene number ``index`` of a split.

    The first digit of scene ``i`` is handwriting ``i mod n`` of the split's ``n``, so that
    every ``n`` scenes in a row show each once; the others are drawn at random. The same
    arguments give the same scene in every process.

    Args:
        index: which scene, from 0 on, without end.
        split: ``"train"`` or ``"test"``, which share no handwriting.
        seed: another seed gives other scenes throughout.
        size: of the image in pixels, one number or (height, width).
        digits: how many digits, one number or (fewest, most). A picture too crowded for
            another digit stays with those that it has.
        digit_size: (smallest, largest) longer side of a digit, as a share of the image's
            shorter side.
        max_overlap: largest intersection over union of the frames of two digits: 0 keeps
            them apart. However large, each digit shows 60 % of its pixels.
        clutter: most distractors behind the digits: lines, blobs, and bits of other
            digits' strokes smaller than half of the smallest digit.
        noise: standard deviation of the pixels' noise, as a share of the full scale.

    Raises:
        ValueError: an argument is out of its range; the message names it.
        ImportError: scikit-learn or OpenCV is not installed.
    """
    index = operator.index(index)
    height, width = _pair("size", size)
    fewest, most = _pair("digits", digits)
    shorter = min(height, width)
    small, large = digit_size
    if index < 0:
        raise ValueError(f"index must be 0 or more, got {index}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    if not 0 <= fewest <= most:
        raise ValueError(f"digits must be (fewest, most) with 0 <= fewest <= most, got {digits}")
    if not 0 < small <= large <= 1:
        raise ValueError(
            "digit_size must be (smallest, largest) with 0 < smallest <= largest <= 1, "
            f"shares of the image's shorter side, got {digit_size}"
        )
    if small * shorter < _SMALLEST_DIGIT:
        raise ValueError(
            f"size {height}x{width} is too small for digit_size {digit_size}: the smallest digit "
            f"would be {small * shorter:.1f} px, and {_SMALLEST_DIGIT} px are needed; take a size "
            f"of {math.ceil(_SMALLEST_DIGIT / small)} or more, or larger digits"
        )
    if not 0 <= max_overlap <= 1:
        raise ValueError(f"max_overlap must be between 0 and 1, got {max_overlap}")
    if clutter < 0:
        raise ValueError(f"clutter must be 0 or more, got {clutter}")
    if noise < 0:
        raise ValueError(f"noise must be 0 or more, got {noise}")

    fields, labels = _atlas(split)
    rng = np.random.default_rng((seed, list(_SPLITS).index(split), index))
    image, paper = _background(rng, height, width)
    for _ in range(rng.integers(clutter + 1)):
        _draw_distractor(rng, image, paper, fields, small * shorter)

    count = int(rng.integers(fewest, most + 1))
    chosen = np.append(index % len(labels), rng.integers(len(labels), size=max(count, 1) - 1))
    owner = np.zeros((height, width), np.int32)  # 0 for paper, k for the k-th digit placed.
    frames = np.empty((0, 4))
    areas: list[int] = []
    kept = []
    for digit in chosen[:count]:
        ink = _write(rng, fields[digit], shorter * rng.uniform(small, large))
        corner = _place(rng, ink >= 0.5, owner, frames, areas, max_overlap)
        if corner is None:
            continue
        y, x = corner
        h, w = ink.shape
        window = np.s_[y : y + h, x : x + w]
        image[window] += ink[..., None] * (_ink_colour(rng, paper, 0.4, 0.75) - image[window])
        frames = np.vstack([frames, (x, y, x + w, y + h)])
        kept.append(digit)
        owner[window][ink >= 0.5] = len(kept)
        areas.append(int((ink >= 0.5).sum()))

    if noise:
        image += noise * rng.standard_normal((height, width, 1), dtype=np.float32)
    kept_labels = labels[kept] if kept else np.empty(0, np.int64)
    masks = owner == np.arange(1, len(kept) + 1)[:, None, None]
    return Scene(
        image=(image.clip(0, 1) * 255 + 0.5).astype(np.uint8),
        labels=kept_labels,
        boxes=np.array([_tight_box(mask) for mask in masks], np.float32).reshape(-1, 4),
        masks=masks,
        semantic=np.append(0, kept_labels + 1).astype(np.uint8)[owner],
    )


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    try:
        first, second = (value, value) if np.ndim(value) == 0 else value
        return operator.index(first), operator.index(second)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be a whole number or a pair of them, got {value!r}"
        ) from None


def _cv2():
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            "drawing the digits needs OpenCV, which is not installed: pip install 'linsight[train]'"
        ) from error
    return cv2


@functools.cache
def _atlas(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The split's digits as smooth fields of ink in 0..1, float32 (n, 48, 48), and labels."""
    cv2 = _cv2()
    images, labels = load_split(split)
    padded = np.pad(images.astype(np.float32) / 16, ((0, 0), *[(_PADDING, _PADDING)] * 2))
    side = padded.shape[1] * _OVERSAMPLING
    fields = []
    for digit in padded:
        # A slight blur turns the staircase of the 8x8 grid into a pen's stroke; sharpening
        # against a wide one opens the holes that the grid had all but filled.
        field = cv2.resize(digit, (side, side), interpolation=cv2.INTER_CUBIC)
        field = cv2.GaussianBlur(field, (0, 0), 0.3 * _OVERSAMPLING)
        fields.append(field + 1.2 * (field - cv2.GaussianBlur(field, (0, 0), 1.2 * _OVERSAMPLING)))
    return np.stack(fields), labels


def _background(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, float]:
    """Paper with a colour gradient and a soft texture, float32 (H, W, 3), and its luminance."""
    cv2 = _cv2()
    paper = rng.uniform(0.05, 0.95)
    gradient = _colour(rng, paper, 0.12) + rng.uniform(-0.1, 0.1, (2, 2, 3))
    cells = rng.integers(3, 9)
    texture = rng.uniform(0, 0.08) * rng.standard_normal((cells, cells, 1))
    image = cv2.resize(gradient.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    spots = cv2.resize(texture.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    return image + spots[..., None], paper


def _colour(rng: np.random.Generator, luminance: float, chroma: float) -> np.ndarray:
    """A random colour of a luminance, float32 (3,) in 0..1."""
    tint = rng.uniform(-chroma, chroma, 3).astype(np.float32)
    return (luminance + tint - tint @ _LUMA).clip(0, 1)


def _ink_colour(rng: np.random.Generator, paper: float, least: float, most: float) -> np.ndarray:
    """A colour whose luminance is at least ``least`` away from the paper's."""
    contrast = rng.uniform(least, most)
    lighter = paper + contrast <= 1 and (paper - contrast < 0 or rng.random() < 0.5)
    luminance = paper + contrast if lighter else max(paper - contrast, 0)
    return _colour(rng, luminance, 0.35)


def _write(rng: np.random.Generator, field: np.ndarray, extent: float) -> np.ndarray:
    """A digit turned, sheared and scaled to a longer side of ``extent`` px: ink, float32 (h, w)."""
    cv2 = _cv2()
    angle, shear = rng.uniform(-0.21, 0.21), rng.uniform(-0.2, 0.2)
    narrow = rng.uniform(0.75, 1.0)
    cos, sin = math.cos(angle), math.sin(angle)
    # From the digit's frame to the image, up to scale: narrow, then shear, then turn.
    forward = np.array([[cos, -sin], [sin, cos]]) @ np.array([[narrow, shear], [0, 1]])
    reach = np.abs(forward).sum(1)
    scale = extent / reach.max()
    width, height = np.ceil(scale * reach).astype(int)
    cells = 8 + 2 * _MARGIN
    inverse = np.linalg.inv(forward) * (cells * _OVERSAMPLING / scale)
    centre = (len(field) - 1) / 2
    shift = centre - inverse @ [(width - 1) / 2, (height - 1) / 2]
    ink = cv2.warpAffine(
        field,
        np.column_stack([inverse, shift]),
        (int(width), int(height)),
        flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
    )
    # The level at which ink ends makes the pen thin or thick; the slope, sharp or soft.
    level, slope = rng.uniform(0.4, 0.6), rng.uniform(2, 5)
    ink = ((ink - level) * slope + 0.5).clip(0, 1)
    x1, y1, x2, y2 = _tight_box(ink > 0)
    return ink[y1:y2, x1:x2]


def _place(
    rng: np.random.Generator,
    mask: np.ndarray,
    owner: np.ndarray,
    frames: np.ndarray,
    areas: list[int],
    max_overlap: float,
) -> tuple[int, int] | None:
    """Top left corner (y, x) where a digit fits among those placed, or None if none is found."""
    (height, width), (h, w) = owner.shape, mask.shape
    ys = rng.integers(height - h + 1, size=_TRIES)
    xs = rng.integers(width - w + 1, size=_TRIES)
    tries = np.stack([xs, ys, xs + w, ys + h], 1)
    overlap = _iou(tries, frames).max(1, initial=0) <= max_overlap
    for x, y in zip(xs[overlap].tolist(), ys[overlap].tolist(), strict=True):
        window = np.s_[y : y + h, x : x + w]
        before = np.bincount(owner.ravel(), minlength=len(areas) + 1)[1:]
        covered = np.bincount(owner[window][mask], minlength=len(areas) + 1)[1:]
        if (before - covered >= _VISIBLE * np.array(areas)).all():
            return y, x
    return None


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = (high - low).clip(0).prod(-1)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b))
    return intersection / (area_a[:, None] + area_b[None] - intersection)


def _tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def _draw_distractor(
    rng: np.random.Generator,
    image: np.ndarray,
    paper: float,
    fields: np.ndarray,
    smallest: float,
) -> None:
    """Draw onto the image, in faint ink, something that is no digit."""
    cv2 = _cv2()
    height, width = image.shape[:2]
    colour = _ink_colour(rng, paper, 0.15, 0.35)
    kind = rng.integers(3)
    if kind == 0:
        # From edge to edge: a short line would be a 1.
        ends = rng.uniform(0, 1, (2, 2)) * [width, height]
        axis = rng.integers(2)
        ends[:, axis] = -2, (width, height)[axis] + 2
        thick = max(1, round(smallest * rng.uniform(0.02, 0.08)))
        start, stop = (tuple((16 * end).astype(int).tolist()) for end in ends)
        cv2.line(image, start, stop, colour.tolist(), thick, cv2.LINE_AA, shift=4)
        return
    # A third of the smallest digit at most: no reader takes it for one.
    extent = smallest * rng.uniform(0.2, 0.45)
    side = max(3, math.ceil(extent))
    axes = side / 2 * (rng.uniform(0.4, 1, 2) if kind == 1 else np.ones(2))
    ys, xs = np.mgrid[:side, :side] - (side - 1) / 2
    disc = (3 * (1 - (xs / axes[0]) ** 2 - (ys / axes[1]) ** 2)).clip(0, 1).astype(np.float32)
    if kind == 1:
        shape = disc
    else:
        ink = _write(rng, fields[rng.integers(len(fields))], 3 * extent)
        h, w = ink.shape
        y, x = rng.integers(max(1, h - side + 1)), rng.integers(max(1, w - side + 1))
        shape = ink[y : y + side, x : x + side] * disc[: h - y, : w - x]
    h, w = shape.shape
    y, x = rng.integers(height - h + 1), rng.integers(width - w + 1)
    image[y : y + h, x : x + w] += shape[..., None] * (colour - image[y : y + h, x : x + w])


class DigitClassification(Dataset):
    """One digit a scene, to be named: items ``(image, label)``, as torchvision's data sets.

    Args:
        split: ``"train"`` or ``"test"``, which share no handwriting.
        length: how many scenes. By default ten for each handwriting in training, four in
            test; each handwriting comes equally often in any multiple of their number.
        transform: takes the PIL image (RGB). Without one, the item is the PIL image.
        target_transform: takes the label, an int 0..9.
        **scene: further arguments of :func:`digit_scene`.
    """

    classes = CLASSES

    def __init__(
        self,
        split: Split = "train",
        length: int | None = None,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
        **scene: Any,
    ) -> None:
        self.length = _length(split, length)
        self.transform = transform
        self.target_transform = target_transform
        self.scene = functools.partial(digit_scene, split=split, digits=1, **scene)
        self.scene(0)  # A bad argument shows here and not in a worker.

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        from PIL import Image

        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is out of range for {self.length} scenes")
        scene = self.scene(index)
        image, label = Image.fromarray(scene.image), int(scene.labels[0])
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            label = self.target_transform(label)
        return image, label


def _length(split: Split, length: int | None) -> int:
    if length is None:
        return len(load_split(split)[1]) * (10 if split == "train" else 4)
    if length < 1:
        raise ValueError(f"length must be 1 or more, got {length}")
    return length
