"""Masks in files: the numbers in them, and the classes that these stand for."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from mmengine.logging import print_log
from PIL import Image

from .loading import DataError, some
from .pictures import turn

#: Number of pixels that belong to no class, where none else is said.
IGNORE = 255
# So many masks are looked at before training.
_LOOKED_AT = 32


def number_values(values: Iterable[int]) -> dict[int, int]:
    """A label_map that numbers the values of masks in their order."""
    return {int(value): label for label, value in enumerate(values)}


def classes_of(numbers: np.ndarray, table: np.ndarray | None) -> np.ndarray:
    """The classes that numbers in a mask stand for by a table of :func:`class_table`."""
    if table is None:
        return numbers
    # The last row is that of numbers beyond 16 bits.
    beyond = (numbers < 0) | (numbers >= len(table))
    return table[np.where(beyond, len(table) - 1, numbers)]


def read_numbers(file: Path) -> np.ndarray:
    """The numbers in the file of a mask: (H, W), or (H, W, C) where it has several channels."""
    with Image.open(file) as mask:
        numbers = np.asarray(turn(mask))
    if numbers.dtype == bool:
        return numbers.astype(np.uint8)
    if np.issubdtype(numbers.dtype, np.floating):
        whole = numbers.astype(np.int64)
        if (whole != numbers).any():
            raise ValueError("its numbers are not whole: save the mask as integers")
        return whole
    return numbers


def read_mask(file: Path) -> np.ndarray:
    """The numbers of a mask (H, W).

    Raises:
        DataError: the file cannot be read, or has several channels.
    """
    try:
        mask = read_numbers(file)
    except Exception as error:
        raise DataError(f"mask {file} cannot be read: {error}") from None
    if mask.ndim != 2:
        raise DataError(
            f"mask {file} has the shape {mask.shape}: a mask has one number for each pixel, not "
            "a colour"
        )
    return mask.astype(np.int32)


def label_table(label_map: Mapping[int, int], ignore_index: int) -> np.ndarray:
    """The class of each 16-bit number, and in the last row of all others; `ignore_index` for those
    that the map does not have.

    Raises:
        ValueError: a number of the map has more than 16 bits.
    """
    table = np.full((1 << 16) + 1, ignore_index, np.int32)
    for number, label in label_map.items():
        if not 0 <= int(number) < 1 << 16:
            raise ValueError(f"label_map has {number}, expected numbers from 0 to {(1 << 16) - 1}")
        table[int(number)] = label
    return table


def class_table(
    reduce_zero_label: bool, label_map: Mapping[int, int] | None, ignore_index: int
) -> np.ndarray | None:
    """The class of each 16-bit number, or None where the numbers are the classes."""
    if label_map is not None:
        return label_table(label_map, ignore_index)
    if reduce_zero_label:
        table = np.arange(-1, 1 << 16, dtype=np.int32)
        table[[0, IGNORE, -1]] = ignore_index
        return table
    return None


def are_grey_levels(numbers: Iterable[int]) -> bool:
    """Whether the numbers in masks are up to 18 evenly spaced shades of grey from black to white,
    such as 0 and 255, or 0, 128 and 255, and so no class ids with 255 for pixels to ignore."""
    levels = sorted(numbers)
    if not 2 <= len(levels) <= 18:
        return False
    return bool(np.abs(np.linspace(0, 255, len(levels)) - levels).max() <= 3)


def check_ignored(
    masks: Sequence[Path],
    classes: Sequence[str],
    ignore_index: int,
    table: np.ndarray | None,
    mapped: bool,
) -> None:
    """Look at masks from the whole data set for classes that have the number to ignore, and say
    which share of their pixels is ignored.

    Args:
        masks: the files.
        classes: names of the classes.
        ignore_index: the label to ignore.
        table: as :func:`class_table` returns it.
        mapped: whether the table is that of a ``label_map``, which says of each number what it is.

    Raises:
        DataError: a table ignores all pixels; or, unless `mapped`, the numbers are grey levels, or
            without a table there is a single class beside what is ignored.
    """
    looked_at = masks[:: -(-len(masks) // _LOOKED_AT)]
    pixels: Counter[int] = Counter()
    for file in looked_at:
        with suppress(Exception):  # a damaged file is counted when its item is read
            mask = read_numbers(file)
            if mask.ndim > 2:  # colours, which are an error when the item is read
                continue
            numbers, counts = np.unique(mask, return_counts=True)
            pixels.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))
    numbers = sorted(pixels)
    labels = dict(zip(numbers, classes_of(np.array(numbers, int), table).tolist(), strict=True))
    ignored = [number for number in numbers if labels[number] == ignore_index]
    if not ignored:
        return
    shown = set(labels.values()) - {ignore_index}
    absent = [str(name) for label, name in enumerate(classes) if label not in shown]
    share = sum(pixels[number] for number in ignored) / pixels.total()
    message = (
        f"the masks in '{masks[0].parent}' ({len(looked_at)} of {len(masks):,} were looked at) "
        f"have the numbers {some(numbers, 5)}"
    )
    if not shown and table is not None:
        which = "label_map lacks" if mapped else "reduce_zero_label ignores"
        set_to = "" if mapped else "it to False, and "
        raise DataError(
            f"{message} alone, which {which}: set {set_to}"
            f"dataset.label_map={number_values(numbers)} if these are classes"
        )
    verb = "is" if len(ignored) == 1 else "are"
    message += f", of which {some(ignored, 5)} {verb} ignored ({share:.1%} of the pixels)"
    if absent and (len(looked_at) == len(masks) or len(shown) < 2):
        message += (
            f", and so no pixel of {len(absent)} of the {len(classes)} classes ({some(absent, 5)})"
        )
    fix = number_values(numbers)
    one_class = table is None and len(shown) < 2 and absent
    if not mapped and (are_grey_levels(numbers) or one_class):
        names = "" if len(numbers) <= len(classes) else f", and name {len(numbers)} classes,"
        kept = {number: label for number, label in labels.items() if 0 <= label < len(classes)}
        kept.pop(ignored[-1], None)
        if table is None:
            kept |= number_values(range(len(classes)))
        raise DataError(
            f"{message}: set label_map={fix}{names} if these numbers stand for classes. If "
            f"{ignored[-1]} is none, label_map={kept} says so"
        )
    fix = str(fix) if len(numbers) <= len(classes) else "{number: class, ...}"
    print_log(
        f"{message}. If {ignored[-1]} is a class, set dataset.label_map={fix}",
        "current",
        logging.WARNING if absent or len(shown) < 2 or share > 0.5 else logging.INFO,
    )
