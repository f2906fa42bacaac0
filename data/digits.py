"""Scenes composed of the 1,797 real handwritten digits that scikit-learn ships.

One seeded generator, :func:`digit_scene`, gives the image together with its class labels,
boxes, instance masks and semantic mask, so that classification, detection and segmentation
train on any machine with no download::

    scene = digit_scene(0, "train", size=(192, 256), digits=(2, 6), digit_size=(0.2, 0.4))

A scene is a function of its arguments alone. There is a scene for every index 0, 1, 2, ..., and no
two are the same, so a longer training set is only a larger ``length``.

**Whose handwriting is in which split.** scikit-learn's digits are the test part of UCI's
optdigits. Its documentation says that 13 people wrote it, but not who wrote which digit. The
order of the digits tells more: the labels run 14 times through one fixed sequence of 130 digits
(``0123456789 0123456789 0123456789 09565...``) with a few missing each time, so they appear to be
14 filled-in forms, one after the other; :data:`FORM_STARTS` lists their beginnings. The test
split is the last three forms (382 digits), the training split the eleven before them (1,415), so
that no form, and no image of a digit, is in both. It is likely, but not certain, that no *writer*
is in both: if 13 people filled in 14 forms, one person filled in two, and it is not recorded
which. By the distances between equal digits they are the tenth and the eleventh form, both in the
training split.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from .digits_ink import background, draw_distractor, ink_colour, smooth, tight_box, write

Split = Literal["train", "test"]

CLASSES = tuple("0123456789")

#: Index of the first digit of each of the 14 forms among scikit-learn's digits.
FORM_STARTS = (0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667)
_SPLITS = {"train": slice(0, 1415), "test": slice(1415, 1797)}

#: Arguments of :func:`digit_scene` for scenes of several digits, for detection and segmentation.
DETECTION: dict[str, Any] = {
    "size": 256,
    "digits": (1, 8),
    "digit_size": (0.14, 0.36),
    "max_overlap": 0.1,
    "clutter": 8,
}

_SMALLEST_DIGIT = 8  # in pixels; with less than one pixel per cell the strokes fall apart
_COVERED = 0.4  # the largest share of a digit's pixels that later digits may cover
_TRIES = 24


@dataclass(frozen=True)
class Scene:
    """A picture of N digits, from back to front, with all of its annotations.

    Later digits lie on top of earlier ones; masks hold the visible pixels only.

    Attributes:
        image: uint8 (H, W, 3), RGB.
        labels: int64 (N,), the digits 0..9.
        boxes: float32 (N, 4), x1 y1 x2 y2 in pixels, the tight bounds of the masks; x2 and y2
            are one more than the coordinates of the last pixel.
        masks: bool (N, H, W), disjoint, none empty.
        semantic: uint8 (H, W), 0 for background and digit + 1 (1..10) on a digit.
            No pixel has the value 255, which means "ignore".
    """

    image: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray
    semantic: np.ndarray


@functools.cache
def load_split(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The handwritten digits of a split, as scikit-learn stores them.

    Returns:
        Images, uint8 (n, 8, 8) with ink from 0 to 16, and labels, int64 (n,). ``n`` is
        1,415 for ``"train"`` and 382 for ``"test"``.

    Raises:
        ValueError: the split is neither ``"train"`` nor ``"test"``.
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
    digits = cast(Any, load_digits())
    part = _SPLITS[split]
    return digits.images[part].astype(np.uint8), digits.target[part].astype(np.int64)


def digit_scene(
    index: int,
    split: Split = "train",
    *,
    seed: int = 0,
    size: int | tuple[int, int] = 64,
    digits: int | tuple[int, int] = 1,
    digit_size: tuple[float, float] = (0.65, 0.95),
    max_overlap: float = 0.05,
    clutter: int = 2,
    noise: float = 0.02,
    distortion: float = 0.0,
) -> Scene:
    """Compose scene number ``index`` of a split.

    The first digit of scene ``i`` is handwritten digit ``i mod n`` of the ``n`` in the split, so
    that ``n`` scenes in a row show each of them once; further digits are drawn at random. The same
    arguments give the same scene in every process.

    Args:
        index: number of the scene, 0 or more.
        split: ``"train"`` or ``"test"``, which share no handwriting.
        seed: every seed gives other scenes.
        size: size of the image in pixels, one number or (height, width).
        digits: number of digits, one number or (fewest, most). A scene that has no room for
            another digit has fewer.
        digit_size: (smallest, largest) longer side of a digit, as a share of the image's
            shorter side.
        max_overlap: largest intersection over union of the frames of two digits; 0 keeps them
            apart. At least 60 % of the pixels of each digit are visible, whatever this is.
        clutter: largest number of distractors behind the digits: lines, blobs, and pieces of
            other digits' strokes, smaller than half of the smallest digit.
        noise: standard deviation of the noise of each pixel, as a share of the full scale.
        distortion: standard deviation, in eighths of a digit, of a smooth displacement of the
            parts of a digit, which imitates another handwriting. Up to about 0.6 digits stay easy
            to read.

    Raises:
        ValueError: an argument is out of its range; the message names it.
        ImportError: scikit-learn or OpenCV is not installed.
    """
    height, width = _pair("size", size)
    fewest, most = _pair("digits", digits)
    _check(index, seed, (height, width), (fewest, most), digit_size, max_overlap, clutter)
    if not noise >= 0:
        raise ValueError(f"noise must be 0 or more, got {noise}")
    if not 0 <= distortion <= 1:
        raise ValueError(f"distortion must be between 0 and 1, got {distortion}")
    smallest, largest = (share * min(height, width) for share in digit_size)

    fields, labels = _fields(split)
    rng = np.random.default_rng((seed, list(_SPLITS).index(split), index))
    image, paper = background(rng, height, width)
    for _ in range(rng.integers(clutter + 1)):
        draw_distractor(rng, image, paper, fields, smallest)

    count = int(rng.integers(fewest, most + 1))
    chosen = np.append(index % len(labels), rng.integers(len(labels), size=max(count, 1) - 1))
    owner = np.zeros((height, width), np.int32)  # 0 on paper, k on the k-th digit placed.
    frames = np.empty((0, 4))
    spare = np.empty(0)  # Pixels that may still be covered of each.
    placed = []
    for digit in chosen[:count]:
        ink = write(rng, fields[digit], rng.uniform(smallest, largest), distortion)
        colour = ink_colour(rng, paper, 0.4, 0.75)
        mask = ink >= 0.5
        (h, w), corner = ink.shape, _place(rng, mask, owner, frames, spare, max_overlap)
        if corner is None:
            continue
        y, x = corner
        window = np.s_[y : y + h, x : x + w]
        image[window] += ink[..., None] * (colour - image[window])
        spare = np.append(
            spare - _overlap_counts(mask, owner[window], len(spare)), _COVERED * mask.sum()
        )
        frames = np.vstack([frames, (x, y, x + w, y + h)])
        placed.append(digit)
        owner[window][mask] = len(placed)

    image += noise * rng.standard_normal((height, width, 1), dtype=np.float32)
    found = labels[placed] if placed else labels[:0]
    masks = owner == np.arange(1, len(placed) + 1)[:, None, None]
    return Scene(
        image=(image.clip(0, 1) * 255 + 0.5).astype(np.uint8),
        labels=found,
        boxes=np.array([tight_box(mask) for mask in masks], np.float32).reshape(-1, 4),
        masks=masks,
        semantic=np.append(0, found + 1).astype(np.uint8)[owner],
    )


def _check(
    index: int,
    seed: int,
    size: tuple[int, int],
    digits: tuple[int, int],
    digit_size: tuple[float, float],
    max_overlap: float,
    clutter: int,
) -> None:
    whole = {"index": index, "seed": seed, "clutter": clutter}
    for name, value in whole.items():
        if not isinstance(value, (int, np.integer)) or value < 0:
            raise ValueError(f"{name} must be a whole number, 0 or more, got {value!r}")
    if not 0 <= digits[0] <= digits[1]:
        raise ValueError(f"digits must be (fewest, most) with 0 <= fewest <= most, got {digits}")
    if np.shape(digit_size) != (2,) or not 0 < digit_size[0] <= digit_size[1] <= 1:
        raise ValueError(
            "digit_size must be (smallest, largest) with 0 < smallest <= largest <= 1, "
            f"shares of the image's shorter side, got {digit_size}"
        )
    smallest = digit_size[0] * min(size)
    if smallest < _SMALLEST_DIGIT:
        raise ValueError(
            f"size {size} is too small for digit_size {digit_size}: the smallest digit would be "
            f"{smallest:.1f} px, and {_SMALLEST_DIGIT} px are needed; take a size of "
            f"{math.ceil(_SMALLEST_DIGIT / digit_size[0])} or more, or larger digits"
        )
    if not 0 <= max_overlap <= 1:
        raise ValueError(f"max_overlap must be between 0 and 1, got {max_overlap}")


def _pair(name: str, value: Any) -> tuple[int, int]:
    try:
        first, second = (value, value) if np.ndim(value) == 0 else value
        return operator.index(first), operator.index(second)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be a whole number or a pair of them, got {value!r}"
        ) from None


@functools.cache
def _fields(split: Split) -> tuple[np.ndarray, np.ndarray]:
    images, labels = load_split(split)
    return smooth(images), labels


def _place(
    rng: np.random.Generator,
    mask: np.ndarray,
    owner: np.ndarray,
    frames: np.ndarray,
    spare: np.ndarray,
    max_overlap: float,
) -> tuple[int, int] | None:
    """Top left corner (y, x) of a place where a digit fits, or None if none is found."""
    (height, width), (h, w) = owner.shape, mask.shape
    ys = rng.integers(height - h + 1, size=_TRIES)
    xs = rng.integers(width - w + 1, size=_TRIES)
    tries = np.stack([xs, ys, xs + w, ys + h], 1)
    apart = _iou(tries, frames).max(1, initial=0) <= max_overlap
    for y, x in zip(ys[apart].tolist(), xs[apart].tolist(), strict=True):
        if (_overlap_counts(mask, owner[y : y + h, x : x + w], len(spare)) <= spare).all():
            return y, x
    return None


def _overlap_counts(mask: np.ndarray, owner: np.ndarray, count: int) -> np.ndarray:
    """How many pixels of each of the ``count`` digits below it a mask covers, int64 (count,)."""
    return np.bincount(owner[mask], minlength=count + 1)[1:]


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = (high - low).clip(0).prod(-1)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b))
    return intersection / (area_a[:, None] + area_b[None] - intersection)


class DigitClassification(Dataset):
    """Scenes of one digit for classification: items ``(image, label)``, as in torchvision.

    Args:
        split: ``"train"`` or ``"test"``, which share no handwriting.
        length: number of scenes, by default ten per handwritten digit of the training split and
            four per digit of the test split. In a multiple of the number of handwritten digits
            each of them comes equally often.
        transform: takes the PIL image (RGB). Without one, the item holds the PIL image.
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
        self.length = scene_count(split, length)
        self.transform = transform
        self.target_transform = target_transform
        self.scene = functools.partial(digit_scene, split=split, digits=1, **scene)
        self.scene(0)  # raises the error of a wrong argument here instead of in a worker

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        scene = scene_of(self, index)
        image, label = Image.fromarray(scene.image), int(scene.labels[0])
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            label = self.target_transform(label)
        return image, label


class DigitSegmentation(Dataset):
    """Scenes of several digits for semantic segmentation: items ``(image, semantic mask)``.

    Args:
        split: ``"train"`` or ``"test"``, which share no handwriting.
        length: number of scenes, by default that of :class:`DigitClassification`.
        transforms: takes the PIL image (RGB) and the PIL mask (8 bits: 0 for background,
            digit + 1 on a digit) and returns both. Without it, the item holds these two.
        **scene: arguments of :func:`digit_scene` that differ from :data:`DETECTION`.
    """

    classes = ("background", *CLASSES)
    ignore_index = 255

    def __init__(
        self,
        split: Split = "train",
        length: int | None = None,
        transforms: Callable[..., Any] | None = None,
        **scene: Any,
    ) -> None:
        self.length = scene_count(split, length)
        self.transforms = transforms
        self.scene = functools.partial(digit_scene, split=split, **{**DETECTION, **scene})
        self.scene(0)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        scene = scene_of(self, index)
        image, mask = Image.fromarray(scene.image), Image.fromarray(scene.semantic)
        return (image, mask) if self.transforms is None else self.transforms(image, mask)


def scene_of(dataset: Any, index: int) -> Scene:
    """Draw the scene at an index by the data set's ``scene`` function."""
    if not 0 <= index < len(dataset):
        raise IndexError(f"index {index} is out of range for {len(dataset)} scenes")
    return dataset.scene(index)


def scene_count(split: Split, length: int | None) -> int:
    """The number of scenes of a data set: `length`, or the default of its split."""
    if length is None:
        return len(load_split(split)[1]) * (10 if split == "train" else 4)
    if length < 1:
        raise ValueError(f"length must be 1 or more, got {length}")
    return length
