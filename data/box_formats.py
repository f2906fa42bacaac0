"""The formats of boxes and outlines: COCO's JSON, YOLO's labels, Pascal VOC's XML."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import numpy as np

from .loading import DataError
from .outlines import mask_fault
from .pictures import files_in, folders_in
from .sources import (
    ENDINGS,
    IMAGE_FOLDERS,
    Sample,
    Source,
    Task,
    image_size,
    images_in,
    mend_coco,
    split_folders,
    split_of,
)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise DataError(f"annotation file {file} is no JSON: {error}") from None


def read_coco(root: Path) -> Source | None:
    if root.is_file():
        base, files = root.parent, [root]
        if base.name.lower() == "annotations":
            base = base.parent
    else:
        base = root
        places = [root, *folders_in(root)]
        unfit = ("captions_", "person_keypoints_", "image_info_", "stuff_", "panoptic_")
        files = sorted(
            f
            for place in places
            for f in files_in(place, (".json",), deep=False)
            if not f.name.startswith(unfit)
        )
    contents: dict[Path, dict] = {}
    notes: list[str] = []
    for file in files:
        content = _read_json(file)
        fits = isinstance(content, dict) and {"images", "annotations"} <= content.keys()
        if fits and isinstance(content.get("categories"), list):
            _check_entries(file, content)
            mended = mend_coco(content)
            if mended:
                how = "; ".join(f"{count} annotations {what}" for what, count in mended.items())
                notes.append(f"{file.name}: {how}: mended")
            contents[file] = content
        elif root.is_file():
            raise DataError(
                f"annotation file {file} lacks one of images, annotations and categories, the "
                "lists of COCO's format"
            )
    if not contents:
        return None
    used, listed = set(), []
    for content in contents.values():
        names = {c["id"]: str(c["name"]) for c in content["categories"]}
        listed += [name for name in dict.fromkeys(names.values()) if name not in listed]
        used |= {names.get(a.get("category_id")) for a in content["annotations"]}
    classes = [name for name in listed if name in used]
    if len(classes) < len(listed):
        idle = [name for name in listed if name not in used]
        notes.append(
            f"{len(idle)} categories have no object, and are left out: {idle[0]}, ..."
            if len(idle) > 1
            else f"the category {idle[0]} has no object, and is left out"
        )
    samples: dict[str, list[Sample]] = {"train": [], "val": [], "test": []}
    for file, content in contents.items():
        split = split_of(file) if len(contents) > 1 else "train"
        samples[split] += _coco_samples(file, content, base, classes, notes)
    task = _task_of(samples, notes)
    return Source(str(root), "COCO's JSON", task, classes, samples, notes)


def _task_of(samples: dict[str, list[Sample]], notes: list[str]) -> Task:
    """Instance segmentation if every object has an outline, from which faulty ones are then left
    out; detection otherwise."""
    every = [sample for found in samples.values() for sample in found]
    outlined = [bool(_outline(obj)) for sample in every for obj in sample.label]
    if not (outlined and all(outlined)):
        if any(outlined):
            notes.append(
                f"{outlined.count(False)} of {len(outlined)} objects have no outline, so that "
                "boxes alone are learned"
            )
        return "detection"
    faulty: Counter[str] = Counter()
    for sample in every:
        right = []
        for obj in sample.label:
            size = sample.size
            if size is None and isinstance(obj["segmentation"], dict):
                with suppress(DataError):  # the check of the data reports the file
                    size = image_size(sample.file)
            width, height = size or (0, 0)  # which polygons do not ask for
            fault = mask_fault(obj, height, width)
            if fault and (isinstance(obj["segmentation"], dict) or not obj["segmentation"]):
                faulty[fault] += 1
            else:
                right.append(obj)
        sample.label = right
    notes += [f"{count} objects {fault} are left out" for fault, count in faulty.items()]
    return "instances"


def _outline(obj: dict) -> Any:
    """The mask of an object; nothing where it is a list of empty lists."""
    mask = obj.get("segmentation")
    return any(mask) if isinstance(mask, list) else mask


def _check_entries(file: Path, content: dict) -> None:
    for part, keys in (("images", ("id", "file_name")), ("categories", ("id", "name"))):
        for place, entry in enumerate(content[part]):
            lacking = [key for key in keys if key not in entry]
            if lacking:
                raise DataError(
                    f"annotation file {file}: entry {place} of {part} has no {', '.join(lacking)}"
                )


def _coco_samples(
    file: Path, content: dict, base: Path, classes: list[str], notes: list[str]
) -> list[Sample]:
    names = {c["id"]: str(c["name"]) for c in content["categories"]}
    folder = _image_folder(file, content["images"], base)
    objects: dict[Any, list[dict]] = {image["id"]: [] for image in content["images"]}
    foreign = 0
    for annotation in content["annotations"]:
        name = names.get(annotation.get("category_id"))
        if annotation.get("image_id") not in objects or name is None or "bbox" not in annotation:
            foreign += 1
            continue
        kept = ("bbox", "segmentation", "area", "iscrowd", "ignore")
        obj = {key: annotation[key] for key in kept if annotation.get(key) is not None}
        objects[annotation["image_id"]].append(obj | {"label": classes.index(name)})
    if foreign:
        notes.append(
            f"{file.name}: {foreign} annotations are left out, for they lack a box, or name an "
            "image or a category that the file does not list"
        )
    samples, missing = [], []
    for image in content["images"]:
        place = folder / _slashes(image["file_name"])
        if not place.is_file():
            missing.append(image["file_name"])
            continue
        size = (image["width"], image["height"]) if image.get("width") else None
        samples.append(Sample(place, objects[image["id"]], size))
    if missing:
        notes.append(
            f"{file.name}: {len(missing)} of {len(content['images'])} images are not in {folder}, "
            f"such as {missing[0]!r}"
        )
    return samples


def _image_folder(file: Path, images: Sequence[dict], base: Path) -> Path:
    """The folder that an annotation file's names of images start from."""
    if not images:
        raise DataError(f"annotation file {file} lists no images")
    names = [_slashes(image["file_name"]) for image in images[:: max(1, len(images) // 20)]]
    nested = [f for top in folders_in(base) for f in (top, *folders_in(top))]
    places = [file.parent, base, *nested]
    hits = {place: sum((place / name).is_file() for name in names) for place in places}
    best = max(places, key=lambda place: (hits[place], split_of(place / "x") == split_of(file)))
    if not hits[best]:
        raise DataError(
            f"annotation file {file}: its images, such as {names[0]!r}, are in no folder of {base}"
        )
    return best


def _slashes(name: Any) -> str:
    """A file's name, which programs of Windows write with backslashes."""
    return str(name).replace("\\", "/")


def read_yolo(root: Path) -> Source | None:
    import yaml

    files = [root] if root.is_file() else files_in(root, (".yaml", ".yml"), deep=False)
    settings, base = {}, root.parent if root.is_file() else root
    for file in files:
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise DataError(f"{file} is no YAML: {str(error).splitlines()[0]}") from None
        if isinstance(content, dict) and "names" in content:
            settings = content
            break
    else:
        if root.is_file():
            raise DataError(f"{root} has no names: YOLO's YAML lists the classes as names")
    labelled = {}
    if settings:
        stated = Path(str(settings.get("path") or "."))
        homes = [home for home in (base / stated, base) if home.is_dir()]
        for split, key in (("train", "train"), ("val", "val"), ("test", "test")):
            found = _yolo_images(settings.get(key), homes)
            if found:
                labelled[split] = found
        if not labelled and root.is_file():
            raise DataError(
                f"{root}: train is {settings.get('train')!r}, where no image is: it starts from "
                f"path, {str(stated)!r}, or from the folder of the file"
            )
    if not labelled and not root.is_file():
        labelled = {split: images_in(place) for split, place in _yolo_places(root).items()}
    if not labelled:
        return None
    names = settings.get("names")
    if names is None and (root / "classes.txt").is_file():
        names = (root / "classes.txt").read_text(encoding="utf-8").split("\n")
        names = [name.strip() for name in names if name.strip()]
    table = dict(names) if isinstance(names, dict) else dict(enumerate(names or ()))
    faults: list[str] = []
    samples = {
        split: [_yolo_sample(file, table, bool(names), faults) for file in found]
        for split, found in labelled.items()
    }
    numbers = sorted(int(number) for number in table)
    classes = [str(table[number]) for number in numbers]
    place = {number: i for i, number in enumerate(numbers)}
    for sample in (s for found in samples.values() for s in found):
        for obj in sample.label:
            obj["label"] = place[obj["label"]]
    notes = [f"{len(faults)} lines of labels are left out, such as {faults[0]}"] if faults else []
    task = _task_of(samples, notes)
    return Source(str(root), "YOLO's labels", task, classes, samples, notes)


def _yolo_places(root: Path) -> dict[str, Path]:
    """The folder of the images of each split, in a folder of YOLO's labels without a YAML file."""

    def is_labelled(place: Path) -> bool:
        images, labels = place / "images", place / "labels"
        return images.is_dir() and labels.is_dir() and bool(files_in(labels, (".txt",)))

    if is_labelled(root):
        splits = split_folders(root / "images")
        return splits if "train" in splits else {"train": root / "images"}
    splits = {s: f / "images" for s, f in split_folders(root).items() if is_labelled(f)}
    if "train" in splits:
        return splits
    # LabelImg writes its labels beside the images.
    beside = any(file.with_suffix(".txt").is_file() for file in images_in(root))
    return {"train": root} if beside and (root / "classes.txt").is_file() else {}


def _yolo_images(entry: Any, homes: Iterable[Path]) -> list[Path]:
    """The images of a split, which YOLO's YAML gives as a folder, a list of files, or several."""
    found: list[Path] = []
    for word in entry if isinstance(entry, list) else [entry] if entry else []:
        # Roboflow's files say ../train/images of what lies beside the YAML file.
        names = (str(word), str(word).removeprefix("../"))
        for place in (home / name for home in homes for name in names):
            if place.is_dir():
                found += images_in(place)
                break
            if place.is_file():
                lines = place.read_text(encoding="utf-8").split("\n")
                found += [
                    next(f for f in (place.parent / n, *(h / n for h in homes)) if f.is_file())
                    for n in map(str.strip, lines)
                    if n and any((p / n).is_file() for p in (place.parent, *homes))
                ]
                break
    return found


def _yolo_sample(file: Path, table: dict, named: bool, faults: list[str]) -> Sample:
    parts = list(file.parts)
    folders = [i for i, part in enumerate(parts) if part.lower() == "images"]
    if folders:
        parts[folders[-1]] = "labels"
    texts = (Path(*parts).with_suffix(".txt"), file.with_suffix(".txt"))
    text = next((t for t in texts if t.is_file()), None)
    try:
        width, height = image_size(file)
    except DataError:
        return Sample(file, [])  # the check of the data reports the file
    objects = []
    lines = text.read_text(encoding="utf-8").splitlines() if text is not None else ()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            label, *values = (float(word) for word in line.split())
        except ValueError:
            label, values = -1.0, []
        known = label == int(label) and label >= 0 and (not named or int(label) in table)
        if not known or not (len(values) == 4 or (len(values) >= 6 and len(values) % 2 == 0)):
            faults.append(f"{file.name}, line {number}: {line.strip()[:40]!r}")
            continue
        table.setdefault(int(label), str(int(label)))
        scaled = np.array(values) * np.resize([width, height], len(values))
        obj: dict[str, Any] = {"label": int(label)}
        if len(values) == 4:
            x, y, w, h = scaled.tolist()
            obj["bbox"] = [x - w / 2, y - h / 2, w, h]
        else:
            points = scaled.reshape(-1, 2)
            low, high = points.min(0), points.max(0)
            obj["bbox"] = [*low.tolist(), *(high - low).tolist()]
            obj["segmentation"] = [scaled.tolist()]
        objects.append(obj)
    return Sample(file, objects)


def read_voc(root: Path) -> Source | None:
    splits = split_folders(root)
    places = splits if "train" in splits else {"train": root}
    files = {}
    for split, place in places.items():
        inner = next((f for f in folders_in(place) if f.name.lower() == "annotations"), place)
        files[split] = files_in(inner, (".xml",), deep=False) or files_in(place, (".xml",))
    if not any(files.values()):
        return None
    entries, classes, notes, faulty = {}, set(), [], []
    for split, found in files.items():
        entries[split] = []
        for file in found:
            try:
                tree = ElementTree.parse(file).getroot()
            except ElementTree.ParseError as error:
                raise DataError(f"annotation file {file} is no XML: {error}") from None
            if tree.tag != "annotation":
                continue
            objects = []
            for node in tree.iter("object"):
                box = node.find("bndbox")
                name = (node.findtext("name") or "").strip()
                try:
                    edges = [
                        float(cast(Any, box).findtext(k) or "")
                        for k in ("xmin", "ymin", "xmax", "ymax")
                    ]
                except (AttributeError, ValueError):
                    faulty.append(file.name)
                    continue
                x1, y1, x2, y2 = edges
                # VOC counts pixels from 1, and its boxes include their last pixel.
                box = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
                objects.append({"label": name, "bbox": box})
                classes.add(name)
            picture = _voc_picture(file, _slashes(tree.findtext("filename") or ""), places[split])
            if picture is None:
                notes.append(f"the image of {file.name} is missing")
                continue
            size = [int(float(tree.findtext(f"size/{k}") or 0)) for k in ("width", "height")]
            entries[split].append(
                Sample(picture, objects, (size[0], size[1]) if all(size) else None)
            )
    names = sorted(classes)
    for sample in (s for found in entries.values() for s in found):
        for obj in sample.label:
            obj["label"] = names.index(obj["label"])
    if not any(entries.values()):
        return None
    if len(splits) == 0:
        entries = _voc_sets(root, entries["train"])
    if len(notes) > 3:
        notes = [f"the images of {len(notes)} XML files are missing: {notes[0]}"]
    if faulty:
        notes.append(f"{len(faulty)} objects have no box, such as one in {faulty[0]}")
    return Source(str(root), "Pascal VOC's XML", "detection", names, entries, notes)


def _voc_picture(file: Path, name: str, place: Path) -> Path | None:
    folders = [
        file.parent,
        place,
        *(f for f in folders_in(place) if f.name.lower() in IMAGE_FOLDERS),
    ]
    names = [name, *(file.stem + ending for e in ENDINGS for ending in (e, e.upper()))]
    candidates = (folder / n for folder in folders for n in names if n)
    return next((f for f in candidates if f.is_file()), None)


def _voc_sets(root: Path, samples: list[Sample]) -> dict[str, list[Sample]]:
    """The samples by the lists in ImageSets/Main, where there are such."""
    chosen = {}
    for split, file in (("train", "train.txt"), ("val", "val.txt"), ("test", "test.txt")):
        listed = root / "ImageSets" / "Main" / file
        if listed.is_file():
            stems = {line.split()[0] for line in listed.read_text().splitlines() if line.strip()}
            chosen[split] = [sample for sample in samples if sample.file.stem in stems]
    return chosen if chosen.get("train") else {"train": samples}
