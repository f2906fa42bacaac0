"""COCO annotation files, checked before a detector trains on them.

mmdet does not check a file: a fault shows an hour later in a data worker, as a NaN, or not at
all. In a config: ``custom_imports = dict(imports=["linsight.data.coco"])``, then
``dataset=dict(type="CheckedCocoDataset", ...)`` with the arguments of mmdet's ``CocoDataset``.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import linsight.kernels.mmcv_operators  # noqa: F401  has to come before mmdet

# isort: split
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmengine import fileio
from mmengine.logging import print_log
from mmengine.registry import DATASETS

from .boxes import OUTSIDE, SMALL, box_fault, look_like_corners, reaches_beyond
from .loading import DataError, flags, mark_corrupt, most_corrupt, some
from .outlines import MASK_FAULTS, mask_fault
from .pictures import read_picture
from .sources import mend_coco

# The keys of an entry that mmdet and COCO's evaluation read without checking that they exist.
_NEEDED = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area"),
    "categories": ("id", "name"),
}
_MADE_UP = {"area": "area w * h", "iscrowd": "iscrowd 0"}


@DATASETS.register_module()
class CheckedCocoDataset(CocoDataset):
    """mmdet's ``CocoDataset``, which reports faults of its files before training.

    Faulty annotations are left out and counted in one warning. Faulty are: a box that is empty,
    not finite, outside its image or, in training, less than a pixel wide or high; an image or a
    category that the file does not list; and, where the pipeline loads masks, a polygon of fewer
    than 3 points or run lengths of another size than the image's. In training a second warning
    counts the annotations from which nothing is learned: those with an ``ignore`` or ``iscrowd``
    flag, and those of categories that are none of the data set's classes. mmdet would drop objects
    whose ``area`` is not above 0; here the area of the box takes its place. In training another
    image takes the place of one that is missing or cannot be read, which is marked in ``corrupt``
    and reported by ``DataCheckHook``.

    Args:
        *args: arguments of ``CocoDataset``.
        corrupt_tolerance: the largest share of training images that may be missing, and the
            largest share that may be unreadable; 0 allows none. In testing no image may be
            missing or unreadable.
        upright: whether objects are those of upright pictures, where EXIF turns a picture in a way
            that width and height in the file do not tell.
        **kwargs: arguments of ``CocoDataset``.

    Raises:
        DataError: the file is missing, is no JSON, or has no images or annotations; an entry lacks
            a key that mmdet needs; the classes are not those of the file; more images are missing
            or unreadable than tolerated; or nothing is left to train on.
    """

    def __init__(
        self,
        *args: Any,
        corrupt_tolerance: float = 0.01,
        upright: bool = True,
        **kwargs: Any,
    ) -> None:
        self.corrupt_tolerance = corrupt_tolerance
        super().__init__(*args, **kwargs)
        steps: list[Any] = self.pipeline.transforms
        # A transform of a user's own class, or for another kind of picture, stays.
        steps[:] = [
            LoadPicture(step, upright)
            if type(step) is LoadImageFromFile and step.color_type == "color"
            else step
            for step in steps
        ]

    def full_init(self) -> None:
        if not self._fully_initialized:
            super().full_init()
            self.corrupt = flags(len(self))

    def COCOAPI(self, path: str) -> COCO:
        """The checked content of the file. mmdet opens the file through this attribute."""
        content = read_annotations(path, evaluated=self.test_mode)
        check_classes(content["categories"], self.metainfo["classes"], path)
        transforms = getattr(self.pipeline, "transforms", ())
        masks = any(getattr(transform, "with_mask", False) for transform in transforms)
        total = len(content.get("annotations", ()))
        faults = remove_faulty(content, masks, shortest=0 if self.test_mode else 1)
        if faults:
            message = f"{path}: {_count(faults)} of {total:,} annotations are faulty: "
            message += _reasons(faults)
            # The evaluation raises an error at such masks.
            if self.test_mode and any(why in MASK_FAULTS for why in faults):
                raise DataError(f"{message}. Mend or remove them to evaluate masks")
            print_log(f"{message}. They are left out", "current", logging.WARNING)
        if filled := fill_areas(content):
            print_log(
                f"{path}: the area of {len(filled)} of {total:,} annotations is not above 0 "
                f"({some(filled)}): the area of the box, w * h, takes its place",
                "current",
                logging.WARNING,
            )
        if beyond := boxes_beyond(content):
            print_log(f"{path}: {beyond}", "current", logging.WARNING)
        if not self.test_mode:
            unlearned = unlearned_annotations(content, self.metainfo["classes"])
            if _count(unlearned) == len(content["annotations"]):
                causes = faults | unlearned
                hints = [_CAUSES[why] for why in causes if why in _CAUSES]
                raise DataError(
                    f"none of the {len(content['images']):,} images of {path} has an object that "
                    f"is left: of {total:,} annotations are {'; '.join([_reasons(causes), *hints])}"
                )
            if unlearned:
                print_log(
                    f"{path}: from {_count(unlearned)} of {total:,} annotations nothing is "
                    f"learned: {_reasons(unlearned)}",
                    "current",
                    logging.WARNING,
                )
        return index_annotations(content)

    def load_data_list(self) -> list[dict]:
        try:
            data_list = super().load_data_list()
        except FileNotFoundError:
            raise DataError(
                f"annotation file {self.ann_file!r} does not exist: set data_root in the config, "
                "or the data loader's dataset.data_root and dataset.ann_file"
            ) from None
        if self.backend_args is not None:  # a check of each file on a server would take too long
            return data_list
        missing = set(missing_files(info["img_path"] for info in data_list))
        if not missing:
            return data_list
        message = (
            f"{len(missing)} of the {len(data_list):,} images of {self.ann_file} do not exist "
            f"({some(sorted(missing))})"
        )
        if self.test_mode or len(missing) > most_corrupt(self.corrupt_tolerance, len(data_list)):
            raise DataError(f"{message}: set the data loader's dataset.data_prefix.img")
        print_log(f"{message}; they are left out", "current", logging.WARNING)
        return [info for info in data_list if info["img_path"] not in missing]

    def filter_data(self) -> list[dict]:
        kept = super().filter_data()
        if not kept:
            raise DataError(
                f"none of the {len(self.data_list):,} images of {self.ann_file} is left: the "
                f"data loader's dataset.filter_cfg is {self.filter_cfg}, and no image has an "
                "object of the data set's classes that it keeps"
            )
        least = (self.filter_cfg or {}).get("min_size", 0)
        small = [i for i in self.data_list if min(i["width"], i["height"]) < least]
        if small and not self.test_mode:
            print_log(
                f"{len(small)} of the {len(self.data_list):,} images of {self.ann_file} are less "
                f"than dataset.filter_cfg.min_size={least} pixels wide or high and are left out: "
                f"{some([info['img_path'] for info in small])}",
                "current",
                logging.WARNING,
            )
        return kept

    def prepare_data(self, idx: int) -> Any:
        """The pipeline's result, or in training None where it failed: mmdet then draws another
        image."""
        try:
            return super().prepare_data(idx)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if self.test_mode:
                raise DataError(f"{self.name_of(idx)} could not be read: {reason}") from error
            most = most_corrupt(self.corrupt_tolerance, len(self))
            mark_corrupt(self, idx, most, error, reason)
            return None

    def name_of(self, index: int) -> str:
        return self.get_data_info(index)["img_path"]


class LoadPicture(LoadImageFromFile):
    """mmcv's ``LoadImageFromFile`` of pictures as all commands of linsight read them.

    A picture may be stored turned, with EXIF saying how. Where width and height of its entry in
    the annotation file are those of the upright picture it is turned upright, and where they are
    those of the stored one it stays.

    Args:
        step: the transform whose place it takes.
        upright: whether a picture is turned upright where they do not tell.

    Raises:
        DataError: the picture has another size than its entry.
    """

    def __init__(self, step: LoadImageFromFile, upright: bool = True) -> None:
        vars(self).update(vars(step))
        self.upright = upright

    def transform(self, results: dict) -> dict | None:
        """Add ``img``, uint8 (H, W, 3) in the order BGR, and its shape."""
        size = results["width"], results["height"]
        try:
            content = fileio.get(results["img_path"], backend_args=self.backend_args)
            picture = read_picture(io.BytesIO(content), size, self.upright)
        except Exception:
            if self.ignore_empty:
                return None
            raise
        if picture.size != size:
            raise DataError(
                f"the picture has {picture.width} x {picture.height} pixels, and its entry in the "
                f"annotation file {size[0]} x {size[1]}: its boxes are of another picture"
            )
        image = np.ascontiguousarray(np.asarray(picture)[..., ::-1])
        results["img"] = image.astype(np.float32) if self.to_float32 else image
        results["img_shape"] = results["ori_shape"] = image.shape[:2]
        return results


def index_annotations(content: dict[str, list[dict]]) -> COCO:
    """mmdet's access to the content of a file."""
    api: Any = COCO()
    api.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        api.createIndex()
    # mmdet's names of the two tables; its COCO class sets them before createIndex makes them.
    api.img_ann_map, api.cat_img_map = api.imgToAnns, api.catToImgs
    return api


def _count(faults: Mapping[str, Sequence[int]]) -> int:
    return sum(map(len, faults.values()))


def _reasons(faults: Mapping[str, Sequence[int]]) -> str:
    return "; ".join(f"{len(ids)} {why} ({some(ids)})" for why, ids in faults.items())


def read_annotations(
    path: str, evaluated: bool = False, report: bool = True
) -> dict[str, list[dict]]:
    """Read a COCO file of instances, mend what :func:`~linsight.data.sources.mend_coco` mends, and
    check that every entry has the keys that mmdet needs.

    Args:
        path: path of the file.
        evaluated: whether the file is for evaluation rather than training. Its annotations then
            need ``iscrowd``, and it may have no annotations and only list images.
        report: whether what was mended is counted in a warning.

    Raises:
        DataError: the file is no COCO file of instances; the message names the entry.
        FileNotFoundError: there is no such file.
    """
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
        except ValueError as error:
            size = os.path.getsize(path)
            raise DataError(f"annotation file {path} ({size} bytes) is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"annotation file {path} holds a {type(content).__name__}, no COCO object")
    mended = mend_coco(content)
    if mended and report:
        print_log(
            f"{path}: {'; '.join(f'{n} annotations {how}' for how, n in mended.items())}: mended",
            "current",
            logging.WARNING,
        )
    for part, keys in _NEEDED.items():
        entries = content.get(part)
        if part == "annotations" and evaluated:
            if not entries:
                continue
            keys = (*keys, "iscrowd")
        if not (isinstance(entries, list) and entries):
            raise DataError(
                f"annotation file {path} has no {part}: COCO's format needs the lists "
                f"{', '.join(_NEEDED)}"
            )
        seen = set()
        for place, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise DataError(
                    f"annotation file {path}: entry {place} of {part} is a "
                    f"{type(entry).__name__}, no COCO object"
                )
            lacking = [key for key in keys if key not in entry]
            if lacking:
                hints = "".join(f"; {_MADE_UP[key]} will do" for key in lacking if key in _MADE_UP)
                raise DataError(
                    f"annotation file {path}: entry {place} of {part} (id {entry.get('id')}) has "
                    f"no {', '.join(lacking)}{hints}"
                )
            if entry["id"] in seen:
                raise DataError(f"annotation file {path}: {part} has the id {entry['id']} twice")
            seen.add(entry["id"])
    for image in content["images"]:
        sides = image["width"], image["height"]
        if not all(isinstance(side, int | float) for side in sides):
            raise DataError(
                f"annotation file {path}: image {image['id']} ({image['file_name']}) has width and "
                f"height {sides}, expected numbers"
            )
        if not min(sides) > 0:
            raise DataError(
                f"annotation file {path}: image {image['id']} ({image['file_name']}) is "
                f"{image['width']} x {image['height']} pixels"
            )
    return content


def check_classes(categories: Sequence[dict], classes: Sequence[str], path: str) -> None:
    """Refuse classes that are not the file's, or that have another order than in the file.

    mmdet numbers classes in the order of the file, whatever the order of `classes`.

    Raises:
        DataError: the classes and the categories do not agree.
    """
    names = [category["name"] for category in categories]
    fix = "set the data loaders' dataset.metainfo.classes, and the model's num_classes to match"
    if absent := [name for name in classes if name not in names]:
        raise DataError(
            f"{len(absent)} of the data set's {len(classes)} classes ({some(absent)}) are not "
            f"among the {len(names)} categories of {path} ({some(names)}): {fix}"
        )
    taken = [name for name in names if name in classes]
    if twice := [name for name in dict.fromkeys(taken) if taken.count(name) > 1]:
        raise DataError(f"{path} has several categories of the same name: {some(twice)}")
    if taken != list(classes):
        raise DataError(
            f"{path} lists the data set's classes in another order, and its order counts: set "
            f"the data loaders' dataset.metainfo.classes to {tuple(taken)}"
        )


_IGNORED = "with an ignore flag"
_CROWD = "with an iscrowd flag"
_OTHER_CLASS = "of a category that is none of the data set's classes"
# What has most likely gone wrong where a fault leaves no annotation.
_CAUSES = {
    SMALL: "bbox is x, y, w, h in pixels, not in shares of the image's sides",
    OUTSIDE: "bbox is x, y, w, h in pixels of the image's width and height in the file",
    _IGNORED: "set ignore to 0",
    _CROWD: "set iscrowd to 0 for single objects",
    _OTHER_CLASS: "set the data loaders' dataset.metainfo.classes",
}


def remove_faulty(
    content: dict[str, list[dict]], masks: bool, shortest: float = 1
) -> dict[str, list[int]]:
    """Remove faulty annotations from the content of a file, in place.

    Of an annotation with several polygons only those of fewer than 3 points are removed.

    Args:
        content: the content of the file, as `read_annotations` returns it.
        masks: whether masks are needed.
        shortest: sides of boxes below this many pixels are a fault; mmdet trains on boxes of 1 or
            more, and evaluates on all.

    Returns:
        The ids of the faulty annotations by their fault.
    """
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    faults: dict[str, list[int]] = defaultdict(list)
    kept = []
    for annotation in content.get("annotations", ()):
        image = images.get(annotation["image_id"])
        if image is None:
            fault = "of an image that the file does not list"
        elif annotation["category_id"] not in categories:
            fault = "of a category that the file does not list"
        else:
            fault = box_fault(annotation["bbox"], image["width"], image["height"], shortest)
        if image is not None and not fault and masks:
            fault = mask_fault(annotation, image["height"], image["width"])
        if fault:
            faults[fault].append(annotation["id"])
        if not fault or (fault == MASK_FAULTS[1] and annotation["segmentation"]):
            kept.append(annotation)
    content["annotations"] = kept
    return dict(faults)


def fill_areas(content: dict[str, list[dict]]) -> list[int]:
    """Give annotations whose area is not above 0 that of their box, in place.

    Returns:
        The ids of these annotations.
    """
    filled = []
    for annotation in content["annotations"]:
        area = annotation["area"]
        if not (isinstance(area, int | float) and area > 0):
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
            filled.append(annotation["id"])
    return filled


def boxes_beyond(content: dict[str, list[dict]]) -> str:
    """A sentence about boxes that reach beyond the edges of their images; empty if none does."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    annotations = content["annotations"]
    beyond = [
        each["id"] for each in annotations if reaches_beyond(each["bbox"], *sizes[each["image_id"]])
    ]
    if not beyond:
        return ""
    corners = 4 * len(beyond) >= len(annotations) and look_like_corners(
        [each["bbox"] for each in annotations], [sizes[each["image_id"]] for each in annotations]
    )
    return (
        f"the boxes of {len(beyond)} of {len(annotations):,} annotations reach beyond the edges of "
        f"their images ({some(beyond, 5)})"
        + (": they look like x1, y1, x2, y2, and bbox is x, y, w, h" if corners else "")
    )


def unlearned_annotations(
    content: dict[str, list[dict]], classes: Sequence[str]
) -> dict[str, list[int]]:
    """The ids of right annotations that mmdet's training drops or ignores, by the reason."""
    taken = {each["id"] for each in content["categories"] if each["name"] in classes}
    found: dict[str, list[int]] = defaultdict(list)
    for annotation in content["annotations"]:
        if annotation["category_id"] not in taken:
            found[_OTHER_CLASS].append(annotation["id"])
        elif annotation.get("ignore"):
            found[_IGNORED].append(annotation["id"])
        elif annotation.get("iscrowd"):
            found[_CROWD].append(annotation["id"])
    return dict(found)


def missing_files(paths: Iterable[str]) -> list[str]:
    """The paths that do not exist. Each folder is listed once, which is faster than a check of
    each file."""
    folders: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = set(os.listdir(folder or ".")) if os.path.isdir(folder) else set()
        if name not in folders[folder]:
            missing.append(path)
    return missing
