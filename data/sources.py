"""What a user's data are: the task, the classes and the splits, read off a folder or a file.

Whatever the format, a :class:`Source` holds the same: for each split its images, each with a class,
with objects as COCO describes them, or with a mask. :mod:`linsight.data.source_formats` has the
formats.
"""

from __future__ import annotations

import csv
import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from .loading import DataError
from .pictures import files_in, folders_in, upright_size

Task = Literal["classification", "detection", "instances", "segmentation"]
Item = TypeVar("Item")

ENDINGS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".avif"),
)
# How people call the splits of a data set.
SPLITS = {
    **dict.fromkeys(("train", "training", "trn", "train2017", "train2014"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "val2017", "val2014"), "val"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages", "leftimg8bit")


@dataclass
class Sample:
    """One image.

    Attributes:
        file: the image.
        label: of classification the index of its class; of detection a list of objects, dicts with
            COCO's ``bbox``, ``iscrowd`` and, for instances, ``segmentation``, and with ``label``,
            the index of the class; of segmentation the file of its mask.
        size: (width, height) in pixels where the annotations say it.
    """

    file: Path
    label: Any
    size: tuple[int, int] | None = None


@dataclass
class Source:
    """A user's data.

    Attributes:
        path: as the user gave it.
        format: the format, in words.
        task: what can be learned from it.
        classes: names of the classes.
        splits: the samples of ``"train"``, ``"val"`` and, where there is one, ``"test"``.
        notes: what was decided while it was read, a sentence each.
        label_map: of segmentation, the class of each number in the masks.
        reader: of a data set that another package reads, the arguments of ``TimmDataset`` for each
            split; ``splits`` is then empty.
    """

    path: str
    format: str
    task: Task
    classes: list[str]
    splits: dict[str, list[Sample]]
    notes: list[str] = field(default_factory=list)
    label_map: dict[int, int] | None = None
    reader: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_source(
    path: str | Path, task: Task | None = None, seed: int = 0, share: float = 0.2
) -> Source:
    """Read what a user's data are, and split them where they are not.

    Args:
        path: a folder, a file of annotations, or ``hfds/`` and the name or the path of a Hugging
            Face data set.
        task: what to learn, where the data leave a choice.
        seed: of the split.
        share: of the images that validate, where the data have no validation split. Each class has
            this share of its images there.

    Raises:
        DataError: the path does not exist, or nothing in it is understood.
    """
    from . import source_formats

    source = source_formats.read(str(path), task)
    if source.reader:
        if "val" not in source.reader:
            _split_reader(source, share, seed)
        return source
    source.splits = {name: samples for name, samples in source.splits.items() if samples}
    if "train" not in source.splits:
        raise DataError(f"{path}: {source.format}, but no image to train on")
    if "val" not in source.splits and "test" in source.splits:
        source.splits["val"] = source.splits["test"]
        source.notes.append("there is no validation split, so the test split validates")
    elif "val" not in source.splits:
        train, val = split_samples(source.splits["train"], _key(source), share, seed)
        if not val:
            raise DataError(
                f"{path}: {len(train)} images are too few to keep some for validation: give 2 of a "
                "class at least, or a folder val"
            )
        source.splits |= {"train": train, "val": val}
        source.notes.append(
            f"there is no validation split: {len(val)} of {len(train) + len(val)} images were "
            f"drawn for it, {share:.0%} of each class, with the seed {seed}"
        )
    _check_classes(source)
    return source


def _split_reader(source: Source, share: float, seed: int) -> None:
    """Have another package's data set validate on a share of the split that it trains on."""
    train = source.reader["train"]
    for name in ("val", "train"):
        source.reader[name] = {**train, "part": {"name": name, "share": share, "seed": seed}}
    source.notes.append(
        f"there is no validation split: {share:.0%} of each class are drawn for it, with the seed "
        f"{seed}"
    )


def _key(source: Source) -> Callable[[Sample], Hashable]:
    """The group of a sample, from each of which a share is drawn."""
    if source.task == "classification":
        return lambda sample: sample.label
    if source.task == "segmentation":
        return lambda sample: None
    counts = Counter(obj["label"] for s in source.splits["train"] for obj in s.label)
    # An image belongs to the rarest of its classes.
    return lambda sample: min(
        (obj["label"] for obj in sample.label), key=lambda label: (counts[label], label), default=-1
    )


def split_samples(
    samples: Sequence[Item], key: Callable[[Item], Hashable], share: float, seed: int
) -> tuple[list[Item], list[Item]]:
    """Draw a share of each group of samples; a group of two or more gives at least one, and keeps
    at least one.

    Returns:
        The samples that remain, and those that were drawn, both in their order.
    """
    groups = defaultdict(list)
    for index, sample in enumerate(samples):
        groups[key(sample)].append(index)
    generator = random.Random(seed)
    drawn: set[int] = set()
    for indices in groups.values():
        if len(indices) > 1:
            count = min(max(1, round(share * len(indices))), len(indices) - 1)
            drawn.update(generator.sample(indices, count))
    remain = [sample for i, sample in enumerate(samples) if i not in drawn]
    return remain, [samples[i] for i in sorted(drawn)]


def _check_classes(source: Source) -> None:
    if not source.classes:
        raise DataError(f"{source.path}: {source.format}, but no class has an image or an object")
    if source.task == "classification" and len(source.classes) < 2:
        raise DataError(
            f"{source.path}: {source.format} of a single class, {source.classes[0]!r}: there is "
            "nothing to tell apart; give a folder for each class"
        )


def class_counts(source: Source, split: str) -> list[int]:
    """How many images, or objects, of a split belong to each class. Of segmentation it is 0: only
    :func:`~linsight.data.source_check.check_source` reads the masks."""
    counts = [0] * len(source.classes)
    for sample in source.splits.get(split, ()):
        if source.task == "classification":
            counts[sample.label] += 1
        elif source.task != "segmentation":
            for obj in sample.label:
                counts[obj["label"]] += 1
    return counts


def class_weights(counts: list[int]) -> list[float]:
    """Weights by which every class that occurs counts alike, 1 on average over the labels."""
    present = [count for count in counts if count]
    total = sum(present)
    return [round(total / (len(present) * count), 4) if count else 1.0 for count in counts]


def folder_of(source: Source) -> Path:
    """The folder of the data, which the names of files in :func:`write_lists` start from."""
    path = Path(source.path).expanduser().resolve()
    return path.parent if path.is_file() else path


def write_lists(source: Source, folder: Path) -> dict[str, str]:
    """Write the splits as files that linsight's data sets read: of classification a CSV with the
    columns file and label, of segmentation one with image and mask, of detection COCO's JSON.

    Args:
        source: the data.
        folder: where the files go; it is made.

    Returns:
        The absolute path of the file of each split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base = folder_of(source)
    written = {}
    for split, samples in source.splits.items():
        if source.task in ("detection", "instances"):
            file = folder / f"{split}.json"
            content = to_coco(source.classes, samples, base)
            file.write_text(json.dumps(content), encoding="utf-8")
        else:
            file = folder / f"{split}.csv"
            rows = [("image", "mask") if source.task == "segmentation" else ("file", "label")]
            for sample in samples:
                label = (
                    _name(sample.label, base)
                    if source.task == "segmentation"
                    else source.classes[sample.label]
                )
                rows.append((_name(sample.file, base), label))
            with file.open("w", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows(rows)
        written[split] = str(file.resolve())
    return written


def _name(file: Path, base: Path) -> str:
    """A file's path from the folder of the data, or its absolute path if it lies elsewhere."""
    file = Path(os.path.abspath(file))
    return file.relative_to(base).as_posix() if file.is_relative_to(base) else str(file)


def to_coco(classes: Sequence[str], samples: Sequence[Sample], base: Path) -> dict[str, list[dict]]:
    """The content of a COCO annotation file whose names of files start from the folder `base`."""
    images, annotations = [], []
    for index, sample in enumerate(samples, 1):
        width, height = sample.size or image_size(sample.file)
        name = _name(sample.file, base)
        images.append({"id": index, "file_name": name, "width": width, "height": height})
        for obj in sample.label:
            entry = {key: value for key, value in obj.items() if key != "label"}
            entry |= {
                "id": len(annotations) + 1,
                "image_id": index,
                "category_id": obj["label"] + 1,
            }
            entry.setdefault("iscrowd", 0)
            if not entry.get("area"):
                entry["area"] = _area(entry["bbox"])
            annotations.append(entry)
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def mend_coco(content: dict[str, Any]) -> dict[str, int]:
    """Mend, in place, what other programs write otherwise than COCO: ids, sizes, boxes, areas and
    flags as texts, flags as truth values, annotations without an id, outlines without a box.

    Ids that are texts of other characters than digits stay as they are.

    Returns:
        How many annotations were mended in which way.
    """
    for part in ("images", "categories"):
        for entry in _entries(content, part):
            if "id" in entry:
                entry["id"] = _whole(entry["id"])
            for key in ("width", "height"):
                if key in entry:
                    entry[key] = _whole(entry[key])
    annotations = _entries(content, "annotations")
    mended: Counter[str] = Counter()
    for entry in annotations:
        before = dict(entry)
        for key in ("id", "image_id", "category_id"):
            if key in entry:
                entry[key] = _whole(entry[key])
        for key in ("iscrowd", "ignore"):
            if key in entry:
                entry[key] = _flag(entry[key])
        if isinstance(entry.get("bbox"), list):
            entry["bbox"] = [_number(value) for value in entry["bbox"]]
        if "area" in entry:
            entry["area"] = _number(entry["area"])
        if any(repr(entry[key]) != repr(value) for key, value in before.items()):
            mended["with texts or truth values for numbers"] += 1
        if not entry.get("bbox") and (box := _box_around(entry.get("segmentation"))):
            entry["bbox"] = box
            mended["without a box, which their outlines give"] += 1
    known = [entry["id"] for entry in annotations if isinstance(entry.get("id"), int)]
    for number, entry in enumerate(
        (e for e in annotations if "id" not in e), max(known, default=0)
    ):
        entry["id"] = number + 1
        mended["without an id"] += 1
    return dict(mended)


def _entries(content: dict[str, Any], part: str) -> list[dict]:
    found = content.get(part)
    return [e for e in found if isinstance(e, dict)] if isinstance(found, list) else []


def _number(value: Any) -> Any:
    """The number that a text stands for; another value as it is."""
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


def _whole(value: Any) -> Any:
    """The whole number that a text stands for; another value as it is."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


def _box_around(polygons: Any) -> list[float] | None:
    """The box around the polygons of an object; None where there are no such."""
    try:
        points = [(x, y) for p in polygons for x, y in zip(p[::2], p[1::2], strict=True)]
        low, high = (tuple(map(edge, *points)) for edge in (min, max))
        return [low[0], low[1], high[0] - low[0], high[1] - low[1]]
    except (TypeError, ValueError, IndexError):
        return None


def _flag(value: Any) -> Any:
    if isinstance(value, str):
        value = value.strip().lower()
        return int(value not in ("", "0", "false", "no", "none", "0.0"))
    return int(value or 0) if isinstance(value, bool | None) else value


def _area(box: Any) -> float:
    try:
        return float(box[2] * box[3])
    except (TypeError, IndexError, KeyError):
        return 0.0


def image_size(file: Path) -> tuple[int, int]:
    """Width and height of an image as it is seen, upright, without reading its pixels.

    Raises:
        DataError: the file is no image.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            return upright_size(image)
    except Exception as error:
        raise DataError(f"{file} is no image that can be read: {error}") from None


def images_in(folder: Path) -> list[Path]:
    """The images in a folder and its sub-folders, by name; hidden files are left out."""
    return files_in(folder, ENDINGS)


def split_folders(root: Path) -> dict[str, Path]:
    """The sub-folders of a folder that are named as splits."""
    return {SPLITS[f.name.lower()]: f for f in folders_in(root) if f.name.lower() in SPLITS}


def split_of(path: Path) -> str:
    """The split that a name speaks of; ``"train"`` if none."""
    for part in (path.stem, path.parent.name):
        words = part.lower().replace("-", "_").replace(".", "_").split("_")
        for word in words:
            if word in SPLITS:
                return SPLITS[word]
    return "train"
