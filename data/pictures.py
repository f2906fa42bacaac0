"""Pictures as every command sees them: upright, RGB, in 8 bits."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path, PurePath
from typing import IO, Any, Literal

import numpy as np
from PIL import ExifTags, Image

# From EXIF's orientation to the turn that sets a picture upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# From the orientation to the turn that undoes it, where that is another one.
_TURNS_BACK = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
_SWAP_SIDES = (5, 6, 7, 8)
# Folders and files that operating systems, storage devices and trainings add to a user's, beside
# those whose names begin with a dot.
_NOT_THE_USERS = frozenset(
    (
        *("__macosx", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),
        *("$recycle.bin", "system volume information", "lost+found", "__pycache__"),
        "work_dirs",
        *("thumbs.db", "ehthumbs.db", "desktop.ini"),
    )
)


def is_hidden(path: str | PurePath) -> bool:
    """Whether a path, relative to the folder of the data, leads to or through what is hidden:
    names that begin with a dot, and those that operating systems, storage devices and trainings
    add."""
    # PurePath takes as long as all the rest, and ImageNet has 1.3 million files.
    parts = str(path).replace(os.sep, "/").split("/")
    return any(
        (part not in (".", "..") and part.startswith(".")) or part.lower() in _NOT_THE_USERS
        for part in parts
    )


def files_in(folder: Path, endings: Collection[str], deep: bool = True) -> list[Path]:
    """The files of a folder that are not hidden, by name, with one of the endings in lower case.

    Args:
        folder: the folder.
        endings: as of ``.png``, or longer ends of names.
        deep: whether sub-folders are included.
    """
    endings = tuple(endings)
    found = (
        file
        for file in (folder.rglob("*") if deep else folder.iterdir())
        if file.name.lower().endswith(endings)
        and not is_hidden(file.relative_to(folder))
        and file.is_file()
    )
    return sorted(found, key=lambda file: file.parts)  # Paths compare ten times slower.


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder that are not hidden, by name."""
    return sorted(f for f in folder.iterdir() if not is_hidden(f.name) and f.is_dir())


def read_picture(
    file: str | Path | IO[bytes], size: tuple[int, int] | None = None, upright: bool = True
) -> Image.Image:
    """Read a picture in RGB; see :func:`prepare`."""
    with Image.open(file) as image:
        return prepare(image, size, upright).convert("RGB")


def prepare(
    image: Image.Image, size: tuple[int, int] | None = None, upright: bool = True
) -> Image.Image:
    """An opened picture upright and in 8 bits; its mode may still be any of 8 bits.

    Of 16 bits the upper 8 are taken, as OpenCV takes them. Floating-point values are 0 to 1, or as
    they are up to 255. A picture to which nothing has to be done is returned unread.

    Args:
        image: the picture.
        size, upright: as :func:`turn` takes them.

    Raises:
        ValueError: the values have no such range, or there are none.
    """
    if not all(image.size):
        raise ValueError(f"the picture has {image.width} x {image.height} pixels")
    # Pillow opens 16-bit PGM files in the mode of 32 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(turn(image, size, upright)) >> 8).astype(np.uint8))
    if image.mode == "I":
        raise ValueError("its pixels are integers of 32 bits: save it in 8 or 16 bits")
    image = turn(image, size, upright)
    if image.mode != "F":
        return image
    values = np.asarray(image)
    least, largest = float(values.min()), float(values.max())
    if not (least >= 0 and largest <= 255):
        raise ValueError(
            f"its pixels are floating-point numbers from {least:g} to {largest:g}, neither 0 to 1 "
            "nor 0 to 255: save it in 8 or 16 bits"
        )
    scale = 255 if largest <= 1 else 1
    return Image.fromarray((values * scale).round().astype(np.uint8))


def turn(
    image: Image.Image, size: tuple[int, int] | None = None, upright: bool = True
) -> Image.Image:
    """An opened picture, upright as its EXIF orientation asks.

    Args:
        image: the picture. It is returned unread where it is upright already.
        size: (width, height) of what annotations refer to. Where EXIF swaps the sides of the
            picture, this tells whether it is turned upright or stays as it is stored.
        upright: whether pictures of which the size does not tell it are turned upright.
    """
    orientation, told = orientation_of(image), told_by(image, size)
    if told is None:
        return image
    if told != "unknown":
        upright = told == "upright"
    if image.format == "TIFF":
        image.load()  # Pillow applies the orientation of this format itself
        back = _TURNS_BACK.get(orientation, _TURNS[orientation])
        return image if upright else image.transpose(back)
    if not upright:
        return image
    turned = image.transpose(_TURNS[orientation])
    turned.info.pop("exif", None)
    return turned


def told_by(
    image: Image.Image, size: tuple[int, int] | None
) -> Literal["upright", "stored", "unknown"] | None:
    """What the (width, height) of what annotations refer to tells of a picture that EXIF turns:
    whether they are those of the picture upright or as it is stored. None of other pictures."""
    orientation = orientation_of(image)
    if orientation not in _TURNS:
        return None
    wide = upright_size(image)
    if orientation in _SWAP_SIDES and wide[0] != wide[1]:
        if size == wide:
            return "upright"
        if size == wide[::-1]:
            return "stored"
    return "unknown"


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened picture, upright as its EXIF orientation asks."""
    if orientation_of(image) not in _SWAP_SIDES:
        return image.size
    # Of a TIFF Pillow states the upright size, in its newer releases.
    tags: Any = getattr(image, "tag_v2", None)
    width, height = (tags[256], tags[257]) if tags else image.size
    return height, width


def orientation_of(image: Image.Image) -> int:
    """The orientation of an opened picture in its EXIF data, 1 to 8; 1 is upright."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises whatever damaged EXIF data lead to; the pixels may be right
        return 1
    return orientation if orientation in _TURNS else 1
