"""A folder of pictures without labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from mmengine.registry import DATASETS
from PIL import Image

from .classification import TransformedImages
from .loading import DataError
from .pictures import files_in, read_picture

# Every tenth picture is kept apart for validation.
APART = 10


@DATASETS.register_module()
def PictureFolder(
    root: str,
    split: Literal["train", "val"] = "train",
    transform: dict | None = None,
    length: int | None = None,
    corrupt_tolerance: float = 0.01,
    mode: str = "RGB",
) -> TransformedImages:
    """All pictures in a folder and its sub-folders, under timm's transform, each with the label 0.

    Args:
        root: the folder. If it has sub-folders ``train`` and ``val``, they are the splits.
        split: otherwise ``"val"`` is every tenth picture in the order of their names, beginning
            with the first, and ``"train"`` the others. A folder of one picture has it in both.
        transform: arguments of :func:`timm.data.create_transform`.
        length: number of items; by default that of the pictures. A larger one repeats them, each
            time with another crop.
        corrupt_tolerance: the largest share of pictures that may be unreadable.
        mode: PIL's name of the colours, such as ``"L"`` for grey pictures of one channel.

    Raises:
        DataError: the folder is missing, or has no picture.
    """
    if not Path(root).is_dir():
        raise DataError(f"the folder of pictures {root!r} does not exist: give one by --data")
    endings = Image.registered_extensions()
    files = files_in(Path(root), endings)
    if not files:
        raise DataError(f"the folder {root!r} holds no pictures: give one with some by --data")
    own = [[f for f in files if f.relative_to(root).parts[0] == name] for name in ("train", "val")]
    if all(own):
        files = own[split == "val"]
    elif split == "val":
        files = files[::APART]
    elif len(files) > 1:
        files = [file for i, file in enumerate(files) if i % APART]
    return TransformedImages(
        partial(_read, files, mode),
        length or len(files),
        transform,
        name_of=partial(_name, files),
        corrupt_tolerance=corrupt_tolerance,
    )


def _read(files: Sequence[Path], mode: str, index: int) -> tuple[Image.Image, int]:
    return read_picture(files[index % len(files)]).convert(mode), 0


def _name(files: Sequence[Path], index: int) -> str:
    return str(files[index % len(files)])
