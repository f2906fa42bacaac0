"""Faults of a user's data, found in seconds before they cost hours of training."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .boxes import box_fault, reaches_beyond
from .loading import some
from .masks import IGNORE, read_mask
from .pictures import told_by, upright_size
from .sources import Sample, Source, class_counts

# Up to so many images of a data set are decoded; of more only the headers and the ends are read.
DECODED = 2000
# The last bytes of a whole file, by format.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}


@dataclass
class Report:
    """What a check found.

    Attributes:
        counts: for each split the images, objects or, of segmentation, pixels of each class.
        images: number of images of each split.
        sizes: (width, height) of the images that can be read.
        corrupt: the images that cannot be read, or are of another size than their entry in a file
            of annotations, with the reason.
        boxes: how many objects have which fault of their box.
        values: numbers in masks that are no class, and in how many masks each is.
        masks: masks that cannot be read or have another size than their image, with the reason.
        duplicates: images that lie in two splits.
        decoded: whether every image was decoded.
        turned: of the images with boxes or masks that EXIF turns, those whose labels are of the
            upright picture by their size ("upright"), or of the picture as it is stored
            ("stored"), and those of which it tells neither ("unknown").
    """

    counts: dict[str, list[int]]
    images: dict[str, int]
    sizes: list[tuple[int, int]] = field(default_factory=list)
    corrupt: dict[Path, str] = field(default_factory=dict)
    boxes: Counter[str] = field(default_factory=Counter)
    values: Counter[int] = field(default_factory=Counter)
    masks: dict[Path, str] = field(default_factory=dict)
    duplicates: list[tuple[Path, Path]] = field(default_factory=list)
    decoded: bool = True
    turned: dict[str, list[Sample]] = field(default_factory=lambda: defaultdict(list))

    @property
    def upright(self) -> bool:
        """Whether labels are those of upright pictures, as far as their sizes tell."""
        return len(self.turned["upright"]) >= len(self.turned["stored"])

    @property
    def median_size(self) -> tuple[int, int]:
        """The median of the shorter and of the longer sides, in pixels."""
        sides = np.sort(np.array(self.sizes or [(224, 224)]), axis=1)
        short, long = np.median(sides, axis=0)
        return int(short), int(long)

    def faults(self) -> list[str]:
        """A sentence for each kind of fault."""
        found = []
        if self.corrupt:
            file, reason = next(iter(self.corrupt.items()))
            names = some(self.corrupt)
            found.append(f"{len(self.corrupt)} images cannot be used: {names} ({reason})")
        if self.masks:
            file, reason = next(iter(self.masks.items()))
            found.append(f"{len(self.masks)} masks do not fit: {file.name} ({reason})")
        found += [f"{count} objects {fault}" for fault, count in self.boxes.items()]
        if self.values:
            numbers = ", ".join(map(str, sorted(self.values)[:5]))
            found.append(f"the masks hold {numbers}, which are no class, and are ignored")
        if unknown := self.turned["unknown"]:
            way = "upright" if self.upright else "stored"
            like = f", as by their sizes those of {len(self.turned[way])} others"
            # Without sizes in the annotations those of the upright pictures are written to COCO's
            # file, which an option of the data set does not turn back.
            sized = any(s.size or isinstance(s.label, Path) for s in unknown)
            fix = f"set upright={not self.upright} in the data sets of the config"
            found.append(
                f"{len(unknown)} images are turned or mirrored by EXIF ({unknown[0].file.name}), "
                f"and their labels are taken to be those of the pictures "
                f"{'set upright' if self.upright else 'as they are stored'}"
                f"{like if self.turned[way] else ''}; if they are not, "
                f"{fix if sized else 'delete the orientation in the files'}"
            )
        if self.duplicates:
            pair = " and ".join(map(str, self.duplicates[0]))
            found.append(
                f"{len(self.duplicates)} images lie in two splits, so that validation is too "
                f"good: {pair}"
            )
        return found


def check_source(source: Source, track=lambda items, total: items) -> Report:
    """Look through all files and labels of a user's data.

    Args:
        source: the data.
        track: called with an iterator over the images and their number; returns the iterator, and
            may show a bar.

    Returns:
        What was found. Nothing is changed.
    """
    counts = {split: class_counts(source, split) for split in source.splits}
    report = Report(counts, {split: len(samples) for split, samples in source.splits.items()})
    samples = [(split, s) for split, found in source.splits.items() for s in found]
    report.decoded = len(samples) <= DECODED

    def look(item: tuple[str, Sample]) -> _Look:
        _, sample = item
        mask, labelled, fault = None, sample.size, ""
        if source.task == "segmentation":
            try:
                mask = read_mask(sample.label)
                labelled = mask.shape[1], mask.shape[0]
            except ValueError as error:
                fault = str(error)
        try:
            size, told = _look_at(sample.file, labelled, report.decoded)
        except Exception as error:
            return _Look(None, str(error).replace(str(sample.file), sample.file.name))
        if labelled not in (None, size) and told != "stored":
            sizes = [f"{width} x {height}" for width, height in (labelled, size)]
            if mask is None:
                return _Look(None, f"it has {sizes[1]} pixels, and its entry {sizes[0]}")
            fault = f"{sizes[0]} pixels, and its image {sizes[1]}"
        if fault or mask is None:
            return _Look(size, fault, told)
        numbers, pixels = np.unique(mask, return_counts=True)
        return _Look(size, "", told, dict(zip(numbers.tolist(), pixels.tolist(), strict=True)))

    # A task of a pool of threads costs more than to open a small image.
    length = 1 + len(samples) // 1000
    groups = [samples[start : start + length] for start in range(0, len(samples), length)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda group: [look(item) for item in group], groups)
        results = track(chain.from_iterable(found), len(samples))
        for (split, sample), seen in zip(samples, results, strict=True):
            if seen.size is None:
                report.corrupt[sample.file] = seen.fault
                continue
            report.sizes.append(seen.size)
            if seen.told and source.task != "classification" and not seen.fault:
                report.turned[seen.told].append(sample)
            if source.task == "segmentation":
                if seen.fault:
                    report.masks[sample.label] = seen.fault
                for number, count in seen.pixels.items():
                    label = (source.label_map or {}).get(number)
                    if label is not None:
                        report.counts[split][label] += count
                    elif number != IGNORE:
                        report.values[number] += 1
            elif source.task != "classification":
                size = sample.size or seen.size
                faults = (_object_fault(thing["bbox"], size) for thing in sample.label)
                report.boxes.update(filter(None, faults))
    report.duplicates = _duplicates(samples)
    return report


@dataclass
class _Look:
    """What one image shows.

    Attributes:
        size: (width, height), upright; None where the image cannot be used.
        fault: of the image, or else of its mask.
        told: see :func:`~linsight.data.pictures.told_by`.
        pixels: how many pixels of the mask have which number.
    """

    size: tuple[int, int] | None
    fault: str = ""
    told: str | None = None
    pixels: dict[int, int] = field(default_factory=dict)


def _look_at(
    file: Path, labelled: tuple[int, int] | None, decode: bool
) -> tuple[tuple[int, int], str | None]:
    """The size of an image, upright, and what the size of its labels tells of its turn.

    Raises:
        Exception: the file is no image, or a part of it is missing.
    """
    with Image.open(file) as image:
        size, told = upright_size(image), told_by(image, labelled)
        if decode:
            image.load()
        elif end := _ENDS.get(image.format or ""):
            with file.open("rb") as stream:
                stream.seek(max(0, file.stat().st_size - 64))
                if end not in stream.read():
                    raise ValueError("its end is missing")
    return size, told


def _object_fault(box: Any, size: tuple[int, int]) -> str | None:
    """What is wrong with the box of an object in an image of (width, height), or None."""
    fault = box_fault(box, *size, shortest=1)
    if fault is None and reaches_beyond(box, *size):
        return "with a box that reaches beyond the edges of the image"
    return fault


def _duplicates(samples: list[tuple[str, Sample]]) -> list[tuple[Path, Path]]:
    """Images of equal content in different splits. Only files of equal length are read."""
    lengths: dict[int, list[tuple[str, Path]]] = defaultdict(list)
    for split, sample in samples:
        lengths[sample.file.stat().st_size].append((split, sample.file))
    found = []
    for group in lengths.values():
        if len({split for split, _ in group}) < 2:
            continue
        seen: dict[bytes, tuple[str, Path]] = {}
        for split, file in group:
            digest = hashlib.blake2b(file.read_bytes()).digest()
            other = seen.setdefault(digest, (split, file))
            if other[0] != split:
                found.append((other[1], file))
    return found
