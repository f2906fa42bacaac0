"""Data of any format that people have, as a `Source`; `box_formats` has the formats of boxes."""

from __future__ import annotations

import contextlib
import csv
from pathlib import Path
from typing import Any

import numpy as np

from .box_formats import read_coco, read_voc, read_yolo
from .loading import DataError
from .masks import IGNORE, are_grey_levels, read_mask
from .pictures import files_in, folders_in
from .sources import (
    ENDINGS,
    IMAGE_FOLDERS,
    SPLITS,
    Sample,
    Source,
    Task,
    images_in,
    split_folders,
    split_of,
)

KNOWN = (
    "a folder for each class (in train/ and val/ or not); COCO's JSON; YOLO's labels with a YAML "
    "file; Pascal VOC's XML; folders images and masks; a CSV file with the columns file and label; "
    "hfds/ and the name of a Hugging Face data set"
)
_MASK_FOLDERS = (
    *("masks", "mask", "labels", "label", "annotations", "segmentationclass", "gt"),
    *("gtfine", "ground_truth", "groundtruth", "annotation"),
)
_FILE_COLUMNS = ("file", "filename", "file_name", "path", "image", "image_path", "filepath", "img")
_LABEL_COLUMNS = ("label", "class", "category", "class_name", "target", "label_name", "species")


def read(path: str, task: Task | None = None) -> Source:
    """Read data of any format that is known.

    Args:
        path: as for :func:`~linsight.data.sources.read_source`.
        task: what to learn, where the data leave a choice.

    Raises:
        DataError: the path does not exist, or nothing in it is understood.
    """
    if path.startswith("hfds/"):
        return _read_hugging_face(path)
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(f"data {path!r} do not exist")
    source = None
    if root.is_file():
        readers = {
            ".csv": _read_csv,
            ".tsv": _read_csv,
            ".json": read_coco,
            ".yaml": read_yolo,
            ".yml": read_yolo,
        }
        if root.suffix.lower() not in readers:
            raise DataError(f"data {path!r} are of no format that is known: {KNOWN}")
        source = readers[root.suffix.lower()](root)
    else:
        readers = (read_yolo, read_coco, read_voc, _read_masks, _read_csv, _read_class_folders)
        if task == "segmentation":
            readers = (_read_masks, *readers)
        for reader in readers:
            if (source := reader(root)) is not None:
                break
    if source is None:
        raise DataError(f"in {path!r} there are no data of a format that is known: {KNOWN}")
    if task not in (None, source.task):
        if (source.task, task) != ("instances", "detection"):
            raise DataError(f"{path}: {source.format} are for {source.task}, not for {task}")
        source.task = "detection"
    return source


def _read_class_folders(root: Path) -> Source | None:
    splits = split_folders(root)
    places = splits if "train" in splits else {"train": root}
    folders = {split: folders_in(place) for split, place in places.items()}
    files = {
        (split, folder.name): found
        for split, inner in folders.items()
        for folder in inner
        if (found := images_in(folder))
    }
    classes = sorted({name for _, name in files}, key=_natural)
    if not classes:
        return None
    notes = []
    empty = sorted(
        {f.name for inner in folders.values() for f in inner} - {name for _, name in files}
    )
    if empty:
        notes.append(f"{len(empty)} folders hold no images: {', '.join(empty[:5])}")
    unread = [f for place in places.values() for f in files_in(place, (".heic", ".heif"))]
    if unread:
        notes.append(
            f"{len(unread)} files of Apple's format HEIC are left out, such as {unread[0].name}: "
            "save them as JPEG"
        )
    loose = [f for place in places.values() for f in files_in(place, ENDINGS, deep=False)]
    if loose:
        notes.append(f"{len(loose)} images lie beside the class folders, and are left out")
    for split in places:
        lacking = [name for name in classes if (split, name) not in files]
        if lacking:
            notes.append(f"the split {split} has no image of {', '.join(lacking[:5])}")
    samples = {
        split: [
            Sample(file, classes.index(name))
            for (of, name), found in files.items()
            if of == split
            for file in found
        ]
        for split in places
    }
    return Source(str(root), "a folder for each class", "classification", classes, samples, notes)


def _natural(name: str) -> tuple:
    """A key that sorts 2 before 10."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def _read_csv(root: Path) -> Source | None:
    files = [root] if root.is_file() else files_in(root, (".csv", ".tsv"), deep=False)
    rows: list[tuple[str, str, str]] = []
    base = root.parent if root.is_file() else root
    for file in files:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is no text in UTF-8: save it so. {error}") from None
        dialect: Any = csv.excel
        if text.splitlines():
            with contextlib.suppress(csv.Error):
                dialect = csv.Sniffer().sniff(text.splitlines()[0], delimiters=",;\t")
        table = csv.DictReader(text.splitlines(), dialect=dialect)
        columns = {name.strip().lower(): name for name in table.fieldnames or ()}
        where = next((columns[name] for name in _FILE_COLUMNS if name in columns), None)
        what = next((columns[name] for name in _LABEL_COLUMNS if name in columns), None)
        if where is None or what is None:
            if root.is_file():
                raise DataError(
                    f"{file} has the columns {', '.join(columns) or 'none'}: name those of the "
                    "files and of the labels file and label"
                )
            continue
        which = next((columns[name] for name in ("split", "set", "subset") if name in columns), "")
        for row in table:
            split = SPLITS.get((row.get(which) or "").strip().lower(), split_of(Path(file.name)))
            rows.append((row[where] or "", (row[what] or "").strip(), split))
    if not rows:
        return None
    classes = sorted({label for _, label, _ in rows if label}, key=_natural)
    samples: dict[str, list[Sample]] = {"train": [], "val": [], "test": []}
    missing, unlabelled = [], 0
    for name, label, split in rows:
        file = _listed_file(base, name, split)
        if file is None:
            missing.append(name)
        elif not label:
            unlabelled += 1
        else:
            samples[split].append(Sample(file, classes.index(label)))
    if missing and len(missing) == len(rows):
        raise DataError(
            f"none of the {len(rows)} files of {files[0]} exists in {base}, such as {missing[0]!r}"
        )
    notes = []
    if missing:
        notes.append(f"{len(missing)} files of the CSV do not exist, such as {missing[0]!r}")
    if unlabelled:
        notes.append(f"{unlabelled} rows of the CSV have no label, and are left out")
    format = "a CSV of files and labels"
    return Source(str(root), format, "classification", classes, samples, notes)


def _listed_file(base: Path, name: str, split: str) -> Path | None:
    """The image that a CSV file names, with or without its ending."""
    name = name.strip().replace("\\", "/")
    if not name:
        return None
    for place in (base / name, base / "images" / name, base / split / name):
        if place.is_file():
            return place
        found = (place.with_name(place.name + ending) for ending in ENDINGS)
        if place.parent.is_dir() and (file := next((f for f in found if f.is_file()), None)):
            return file
    return None


def _read_hugging_face(path: str) -> Source:
    try:
        import datasets
    except ModuleNotFoundError:
        raise DataError(f"{path} needs the package datasets: pip install datasets") from None
    name = path.removeprefix("hfds/")
    try:
        builder = datasets.load_dataset_builder(name)
        names = datasets.get_dataset_split_names(name)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: no such Hugging Face data set can be opened: {reason}") from None
    features = builder.info.features or datasets.load_dataset(name, split=names[0]).features
    labels = [key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    images = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    if not (labels and images):
        raise DataError(
            f"{path} has the columns {', '.join(features)}: one of images and one of "
            "class labels are needed"
        )
    splits = {SPLITS.get(str(split).lower(), str(split)): str(split) for split in names}
    if "train" not in splits:
        raise DataError(f"{path} has the splits {', '.join(map(str, names))}, and no train")
    common = {"name": path, "input_key": images[0], "target_key": labels[0]}
    reader = {"train": {**common, "split": splits["train"]}}
    if validation := splits.get("val") or splits.get("test"):
        reader["val"] = {**common, "split": validation}
    classes = features[labels[0]].names
    format = "a Hugging Face data set"
    return Source(path, format, "classification", classes, {}, reader=reader)


def _read_masks(root: Path) -> Source | None:
    pairs = _mask_folders(root)
    if not pairs:
        return None
    samples: dict[str, list[Sample]] = {}
    missing: list[str] = []
    for split, (images, masks) in pairs.items():
        found = {f.relative_to(masks).with_suffix("").as_posix(): f for f in images_in(masks)}
        samples[split] = []
        for image in images_in(images):
            key = image.relative_to(images).with_suffix("").as_posix()
            names = (key, f"{key}_mask", f"{key}_label", f"{key}_labelTrainIds", f"{key}_gt")
            mask = next((found[name] for name in names if name in found), None)
            if mask is None:
                missing.append(image.name)
            else:
                samples[split].append(Sample(image, mask))
    if not any(samples.values()):
        return None
    notes = [f"{len(missing)} images have no mask: {missing[0]}, ..."] if missing else []
    values: set[int] = set()
    every = [s.label for found in samples.values() for s in found]
    for file in every[:: max(1, len(every) // 500)]:
        with contextlib.suppress(DataError):  # the check of the data reports it
            values |= set(np.unique(read_mask(file)).tolist())
    if not values:
        read_mask(every[0])  # raises the error
    lossy = [file for file in every if file.suffix.lower() in (".jpg", ".jpeg")]
    if lossy and not values <= {0, 255}:
        raise DataError(
            f"{lossy[0]}: JPEG does not keep the numbers of a mask, which are now {len(values)}: "
            "save masks as PNG"
        )
    names = next(
        (f for n in ("classes.txt", "labels.txt", "class_names.txt") if (f := root / n).is_file()),
        None,
    )
    if values <= {0, 255} or values <= {0, 1}:
        table = {0: 0, max(1, *values): 1}
        classes = ["background", "foreground"]
        if 255 in values:
            notes.append("the masks hold 0 and 255: 255 is taken for the foreground")
    else:
        # 255 is for pixels to ignore, unless the numbers are shades of grey.
        grey = are_grey_levels(values)
        numbers = sorted(values if grey else values - {IGNORE})
        if IGNORE in values:
            notes.append(
                f"the masks hold {', '.join(map(str, numbers))}: shades of grey are taken for one "
                "class each"
                if grey
                else "the masks hold 255, which is taken for pixels of no class"
            )
        if names is not None and not grey:
            numbers = list(range(max(numbers) + 1))
        table = {number: i for i, number in enumerate(numbers)}
        classes = ["background" if number == 0 else str(number) for number in numbers]
    if names is not None:
        listed = [line.strip() for line in names.read_text(encoding="utf-8").split("\n")]
        listed = [line for line in listed if line]
        if len(listed) < len(classes):
            raise DataError(
                f"{names} names {len(listed)} classes, and the masks hold numbers up to "
                f"{max(table)}: give a line for each, that of 0 first"
            )
        classes = listed
        table = table if len(listed) == len(table) else {i: i for i in range(len(listed))}
    if len(classes) < 2:
        raise DataError(f"{root}: all masks hold the number {min(values)} alone")
    format = "images and masks"
    return Source(str(root), format, "segmentation", classes, samples, notes, label_map=table)


def _mask_folders(root: Path) -> dict[str, tuple[Path, Path]]:
    """The folders of images and of masks of each split."""

    def pair(place: Path) -> tuple[Path, Path] | None:
        inner = {f.name.lower(): f for f in folders_in(place)}
        images = next((inner[name] for name in IMAGE_FOLDERS if name in inner), None)
        named = (inner[name] for name in _MASK_FOLDERS if name in inner)
        masks = next((folder for folder in named if images_in(folder)), None)
        return (images, masks) if images and masks else None

    splits = split_folders(root)
    found = {split: p for split, place in splits.items() if (p := pair(place))}
    if "train" in found:
        return found
    whole = pair(root)
    if whole is None:
        return {}
    images, masks = (split_folders(folder) for folder in whole)
    both = {split: (images[split], masks[split]) for split in images if split in masks}
    return both if "train" in both else {"train": whole}
