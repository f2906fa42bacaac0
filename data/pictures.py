"""Pictures as every command sees them: upright, RGB, in 8 bits."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePath
from typing import IO

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
SWAP_SIDES = (5, 6, 7, 8)
# Folders and files that operating systems and storage devices add to a user's, beside those whose
# names begin with a dot.
_NOT_THE_USERS = frozenset(
    (
        *("__macosx", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),
        *("$recycle.bin", "system volume information", "lost+found", "__pycache__"),
        *("thumbs.db", "ehthumbs.db", "desktop.ini"),
    )
)


def is_hidden(path: str | PurePath) -> bool:
    """Whether a path, relative to the folder of the data, leads to or through what is hidden:
    names that begin with a dot, and those that operating systems and storage devices add."""
    return any(
        part.startswith(".") or part.lower() in _NOT_THE_USERS
        for part in PurePath(path).parts
        if part != ".."
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
        size: (width, height) of what annotations refer to. A picture whose sides EXIF swaps is
            left as it is stored where that, and not the upright picture, has this size.
        upright: False leaves every picture as it is stored. (Pillow turns a TIFF on reading.)
    """
    if image.format == "TIFF":
        image.load()  # Pillow applies the orientation of this format itself
    orientation = orientation_of(image) if upright else 1
    swapped = orientation in SWAP_SIDES and image.size[0] != image.size[1]
    if orientation not in _TURNS or (swapped and size == image.size):
        return image
    turned = image.transpose(_TURNS[orientation])
    turned.info.pop("exif", None)
    return turned


def orientation_of(image: Image.Image) -> int:
    """The orientation of an opened picture in its EXIF data, 1 to 8; 1 is upright."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises whatever damaged EXIF data lead to; the pixels may be right
        return 1
    return orientation if orientation in _TURNS else 1
