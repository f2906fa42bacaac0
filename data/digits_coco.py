"""Digit scenes as a COCO data set: a dictionary in memory, or a folder on disk.

mmdet's ``CocoDataset`` and readers of segmentation folders take the folder as it is::

    digits/
        images/train/000000.png ...     images/test/000000.png ...
        semantic/train/000000.png ...   semantic/test/000000.png ...
        instances_train.json            instances_test.json
        digits.json                     the settings of the scenes
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from .digits import CLASSES, DETECTION, Scene, Split, digit_scene

_SETTINGS = "digits.json"


def coco_dict(split: Split, length: int, **scene: Any) -> dict[str, Any]:
    """The annotations of scenes 0 to ``length - 1`` in COCO's instances format.

    Args:
        split: ``"train"`` or ``"test"``.
        length: number of scenes.
        **scene: arguments of :func:`~linsight.data.digits.digit_scene` that differ from
            :data:`~linsight.data.digits.DETECTION`.

    Returns:
        A dictionary that ``json.dump`` takes, with ``images``, ``annotations`` (bbox x y w h
        in pixels, area in pixels, iscrowd 0, segmentation as compressed run lengths) and
        ``categories``, named ``"0"`` to ``"9"`` with the ids 1 to 10: the values of the
        semantic masks. An image's id is the index of its scene.

    Raises:
        ValueError: an argument is out of its range.
        ImportError: pycocotools, scikit-learn or OpenCV is not installed.
    """
    return _coco(_scenes(split, length, scene))


def write_coco(
    folder: str | os.PathLike[str],
    *,
    train: int = 2000,
    test: int = 382,
    **scene: Any,
) -> Path:
    """Write digit scenes to a folder, unless it holds them already.

    The folder gets its name only when it is complete, so that an existing folder can be trusted;
    several processes may call this at once.

    Args:
        folder: the folder to make, with its parents.
        train: number of training scenes.
        test: number of test scenes.
        **scene: as in :func:`coco_dict`.

    Returns:
        The folder.

    Raises:
        FileExistsError: ``folder`` exists and holds other files, or scenes of other settings.
        ValueError, ImportError: as in :func:`coco_dict`.
    """
    folder = Path(folder)
    lengths: dict[Split, int] = {"train": train, "test": test}
    settings = json.loads(json.dumps({**lengths, **DETECTION, **scene}))
    if _holds(folder, settings):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(
        tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".partial", dir=folder.parent)
    )
    try:
        for split, length in lengths.items():
            _write_split(partial, split, length, scene)
        (partial / _SETTINGS).write_text(json.dumps(settings, indent=2))
        partial.chmod(0o777 & ~_umask())  # mkdtemp makes a folder that only its owner can read
        # Another process may have made the same folder in the meantime.
        with contextlib.suppress(OSError):
            partial.rename(folder)
        if not _holds(folder, settings):
            raise FileExistsError(f"{folder} appeared while its digit scenes were being written")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _holds(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds the scenes of these settings; False when nothing is there."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads((folder / _SETTINGS).read_text())
    except (OSError, ValueError):
        raise FileExistsError(
            f"{folder} exists and holds no digit scenes: name another folder, or remove it"
        ) from None
    if found != settings:
        names = sorted(k for k in {*found, *settings} if found.get(k) != settings.get(k))
        changes = ", ".join(f"{k} {found.get(k)} instead of {settings.get(k)}" for k in names)
        raise FileExistsError(
            f"{folder} holds digit scenes with other settings ({changes}): "
            "name another folder, or remove it"
        )
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_split(folder: Path, split: Split, length: int, scene: dict[str, Any]) -> None:
    from PIL import Image
    from rich.progress import track

    for kind in ("images", "semantic"):
        (folder / kind / split).mkdir(parents=True)

    def write_images() -> Iterator[Scene]:
        scenes = _scenes(split, length, scene)
        for index, item in enumerate(track(scenes, f"digit scenes, {split}", total=length)):
            name = f"{split}/{index:06d}.png"
            # Noise hardly compresses, and level 1 writes four times faster than the default.
            Image.fromarray(item.image).save(folder / "images" / name, compress_level=1)
            Image.fromarray(item.semantic).save(folder / "semantic" / name)
            yield item

    (folder / f"instances_{split}.json").write_text(json.dumps(_coco(write_images())))


def _scenes(split: Split, length: int, scene: dict[str, Any]) -> Iterator[Scene]:
    if length < 1:
        raise ValueError(f"length must be 1 or more, got {length}")
    return (digit_scene(index, split, **{**DETECTION, **scene}) for index in range(length))


def _coco(scenes: Iterator[Scene]) -> dict[str, Any]:
    try:
        from pycocotools import mask as run_length
    except ImportError as error:
        raise ImportError(
            "COCO masks need pycocotools, which is not installed: pip install 'linsight[train]'"
        ) from error
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, scene in enumerate(scenes):
        height, width = scene.semantic.shape
        images.append(
            {"id": index, "file_name": f"{index:06d}.png", "height": height, "width": width}
        )
        for label, box, mask in zip(scene.labels, scene.boxes, scene.masks, strict=True):
            encoded = run_length.encode(np.asfortranarray(mask, np.uint8))
            x1, y1, x2, y2 = box.tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,  # COCOeval reads an id of 0 as "no match"
                    "image_id": index,
                    "category_id": int(label) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {
                        "size": [height, width],
                        "counts": cast(bytes, encoded["counts"]).decode("ascii"),
                    },
                }
            )
    return {
        "info": {"description": "linsight digit scenes"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": digit + 1, "name": name, "supercategory": "digit"}
            for digit, name in enumerate(CLASSES)
        ],
    }
