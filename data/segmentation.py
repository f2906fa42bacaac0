"""Data sets of images and label masks for mmengine, under torchvision's transforms.

A mask holds the class of each pixel; pixels of the value ``ignore_index``, by default
:data:`~linsight.data.masks.IGNORE`, belong to no class.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.registry import DATASETS
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import tv_tensors
from torchvision.datasets import Cityscapes as TorchvisionCityscapes
from torchvision.transforms import v2

from .digits import DigitSegmentation
from .lists import read_pairs
from .loading import DataError, TolerantDataset, flags
from .mask_transforms import build_transforms
from .masks import IGNORE, check_ignored, class_table, classes_of, number_values, read_numbers
from .pictures import files_in, read_picture
from .sources import ENDINGS


class TransformedMasks(TolerantDataset):
    """A data set of (PIL image, mask (H, W)) under torchvision's transforms.

    An item is a normalised image, float32 (3, H, W), and its labels, uint8 (H, W).

    Args:
        read: returns the PIL image and the mask, an array (H, W), at an index.
        length: number of items.
        transforms: see :func:`build_transforms`; they take the image, uint8 (3, H, W), and the
            mask.
        classes: names of the classes.
        test_mode: transform the image alone. The labels keep their size, and the model resizes its
            predictions to it.
        mean, std: normalisation of the channels (R, G, B), by default ImageNet's.
        name_of: returns the file name of the item at an index.
        corrupt_tolerance: the largest share of files that may be unreadable.
        ignore_index: label, 0 to 255, of pixels that belong to no class; padding has it, too. The
            model's ``ignore_index`` must be the same.

    Attributes:
        unlabelled: bool (length,), whether an item that was read has no labelled pixel.
        seen: bool (256,), whether a label was in a mask that was read.

    Raises:
        DataError: there are more than 255 classes, or `ignore_index` is no label of 8 bits; or,
            when an item is read, its mask has another size than its image or a label that belongs
            to no class.
    """

    def __init__(
        self,
        read: Callable[[int], tuple[Image.Image, np.ndarray]],
        length: int,
        transforms: Sequence[dict],
        classes: Sequence[str],
        test_mode: bool = False,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        name_of: Callable[[int], str] = str,
        corrupt_tolerance: float = 0.01,
        ignore_index: int = IGNORE,
    ) -> None:
        if len(classes) > IGNORE:
            raise DataError(f"{len(classes)} classes are more than the {IGNORE} of an 8-bit mask")
        if not 0 <= ignore_index <= 255:
            raise DataError(f"ignore_index is {ignore_index}, expected 0 to 255, a label of 8 bits")
        super().__init__(read, length, name_of, corrupt_tolerance)
        self.unlabelled = flags(length)
        self.seen = flags(256)
        self.transforms = build_transforms(transforms, ignore_index)
        self.test_mode = test_mode
        self.ignore_index = ignore_index
        self.metainfo = {
            "classes": list(map(str, classes)),
            "mean": [*mean],
            "std": [*std],
            "ignore_index": ignore_index,
        }

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        index, (picture, mask) = self.read_from(index)
        self._check(index, picture, mask)
        image = tv_tensors.Image(v2.functional.pil_to_tensor(picture))
        labels = tv_tensors.Mask(torch.from_numpy(mask.astype(np.uint8)))
        if self.test_mode:
            image = self.transforms(image)
        else:
            image, labels = self.transforms(image, labels)
        image = v2.functional.to_dtype(image, torch.float32, scale=True)
        image = v2.functional.normalize(image, self.metainfo["mean"], self.metainfo["std"])
        return image.as_subclass(torch.Tensor), labels.as_subclass(torch.Tensor)

    def _check(self, index: int, picture: Image.Image, mask: np.ndarray) -> None:
        name, classes = self.name_of(index), len(self.metainfo["classes"])
        if mask.shape != picture.size[::-1]:
            colour = ", and not a colour" if mask.ndim == 3 else ""
            raise DataError(
                f"the mask of {name} has the shape {mask.shape}, and its image (height, width) "
                f"{picture.size[::-1]}: a mask has one number for each pixel of its image, the "
                f"number of the class{colour}"
            )
        labelled = mask[mask != self.ignore_index]
        if not labelled.size:
            self.unlabelled[index] = True
        elif labelled.max() >= classes or labelled.min() < 0:
            values = np.unique(mask)
            bad = values[(values != self.ignore_index) & ((values >= classes) | (values < 0))]
            fix = "reduce_zero_label if 0 means none and classes count from 1"
            if len(values) <= classes:
                mapped = f"label_map={number_values(values)}"
                fix = f"{mapped} if these numbers stand for classes, or {fix}"
            raise DataError(
                f"the mask of {name} has the labels {str(bad[:5].tolist())[1:-1]}, and there are "
                f"{classes} classes: labels are 0 to {classes - 1}, or {self.ignore_index} for "
                f"pixels to ignore; set {fix}"
            )
        elif not self.seen[:classes].all():
            self.seen[np.flatnonzero(np.bincount(labelled))] = True


def _find_pairs(
    image_root: Path, mask_root: Path, suffixes: tuple[str, ...], mask_suffix: str
) -> list[tuple[Path, Path]]:
    """The images in a folder, each with its mask in another."""
    for folder in (image_root, mask_root):
        if not folder.is_dir():
            raise DataError(
                f"data set folder '{folder}' does not exist: set data_root in the config, or "
                "train_dataloader.dataset.root and val_dataloader.dataset.root"
            )
    files = files_in(image_root, suffixes)
    if not files:
        raise DataError(f"folder '{image_root}' holds no images ({', '.join(suffixes)})")
    pairs = []
    for file in files:
        suffix = next(s for s in suffixes if file.name.lower().endswith(s))
        stem = file.name[: -len(suffix)]
        pairs.append((file, mask_root / file.relative_to(image_root).with_name(stem + mask_suffix)))
    missing = [mask for _, mask in pairs if not mask.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(pairs):,} images in '{image_root}' have no mask: "
            f"{', '.join(map(str, missing[:3]))}{', ...' if len(missing) > 3 else ''} "
            f"{'does' if len(missing) == 1 else 'do'} not exist"
        )
    return pairs


@DATASETS.register_module()
def SegmentationFolder(
    root: str,
    images: str = "",
    masks: str = "",
    classes: Sequence[str] = (),
    transforms: Sequence[dict] = (),
    image_suffix: str | Sequence[str] = ENDINGS,
    mask_suffix: str = ".png",
    reduce_zero_label: bool = False,
    label_map: Mapping[int, int] | None = None,
    annotations: str | None = None,
    upright: bool = True,
    **options: Any,
) -> TransformedMasks:
    """A folder of images and a folder of masks with the same names, sub-folders included.

    Args:
        root: the folder that holds both.
        images: sub-folder of the images.
        masks: sub-folder of the masks, files of one channel.
        classes: names of the classes.
        transforms: see :func:`build_transforms`.
        image_suffix: the ending, or the endings, of the images' names.
        mask_suffix: the ending that a mask's name has in place of its image's.
        reduce_zero_label: in the masks 0 means that a pixel belongs to no class, and the classes
            count from 1.
        label_map: the class of each number in the masks; pixels of other numbers are ignored.
            Masks of 0 and 255, for example, have two classes by ``{0: 0, 255: 1}``.
        annotations: a CSV file with the columns image and mask, in place of the two folders;
            names of files start from `root`.
        upright: whether masks are those of upright pictures, where EXIF turns an image in a way
            that the size of its mask does not tell.
        **options: further arguments of :class:`TransformedMasks`.

    Raises:
        DataError: a folder is missing or empty, an image has no mask, or the masks have no more
            than one class beside pixels to ignore.
    """
    if annotations is not None:
        image_root = Path(root)
        listed = read_pairs(annotations, ("image", "mask"))
        pairs = [(image_root / image, image_root / mask) for image, mask in listed]
    else:
        suffixes = (image_suffix,) if isinstance(image_suffix, str) else tuple(image_suffix)
        image_root = Path(root, images)
        pairs = _find_pairs(image_root, Path(root, masks), suffixes, mask_suffix)
    ignore_index = options.get("ignore_index", IGNORE)
    table = class_table(reduce_zero_label, label_map, ignore_index)
    mask_files = [mask for _, mask in pairs]
    check_ignored(mask_files, classes, ignore_index, table, label_map is not None)

    return TransformedMasks(
        partial(_read_pair, pairs, table, upright),
        len(pairs),
        transforms,
        classes,
        name_of=partial(_name_pair, pairs, image_root),
        **options,
    )


def _read_pair(
    pairs: Sequence[tuple[Path, Path]], table: np.ndarray | None, upright: bool, index: int
) -> tuple[Image.Image, np.ndarray]:
    image_file, mask_file = pairs[index]
    labels = read_numbers(mask_file)
    picture = read_picture(image_file, labels.shape[1::-1], upright)
    return picture, labels if labels.ndim > 2 else classes_of(labels, table)


def _name_pair(pairs: Sequence[tuple[Path, Path]], root: Path, index: int) -> str:
    return os.path.relpath(pairs[index][0], root)


def named_colours(kind: str) -> tuple[tuple[str, ...], list[tuple[int, int, int]]] | None:
    """The classes of a benchmark and the colours (R, G, B) in which its masks are usually drawn.

    Args:
        kind: ``"ADE20K"`` or ``"Cityscapes"``; of other data sets the result is None.
    """
    if kind == "ADE20K":
        text = Path(__file__).with_name("ade20k.csv").read_text(encoding="utf-8")
        rows = [line.split(",") for line in text.splitlines()[1:]]
        colours = [(int(c[:2], 16), int(c[2:4], 16), int(c[4:], 16)) for _, c in rows]
        return tuple(name for name, _ in rows), colours
    if kind == "Cityscapes":
        evaluated = _cityscapes()
        return tuple(each.name for each in evaluated), [each.color for each in evaluated]
    return None


def _colour(dataset: TransformedMasks, kind: str) -> TransformedMasks:
    named = named_colours(kind)
    if named is not None:
        dataset.metainfo["palette"] = named[1]
    return dataset


def _cityscapes() -> list[Any]:
    """torchvision's entries of the 19 classes that the benchmark evaluates, by their label."""
    evaluated = [each for each in TorchvisionCityscapes.classes if 0 <= each.train_id < IGNORE]
    return sorted(evaluated, key=lambda each: each.train_id)


@DATASETS.register_module()
def ADE20K(root: str, split: str = "training", **options: Any) -> TransformedMasks:
    """ADE20K of the scene parsing benchmark: 150 classes; other pixels are ignored.

    Args:
        root: the unpacked ADEChallengeData2016, whose objectInfo150.txt names the classes.
        split: ``"training"`` or ``"validation"``.
        **options: further arguments of :func:`SegmentationFolder`.
    """
    names = Path(root, "objectInfo150.txt")
    if not names.is_file():
        raise DataError(
            f"{names} does not exist: set data_root in the config to the unpacked "
            "ADEChallengeData2016"
        )
    rows = [line.split("\t") for line in names.read_text().splitlines()[1:] if line.strip()]
    classes = [row[-1].split(",")[0].strip() for row in rows]
    dataset = SegmentationFolder(
        root,
        f"images/{split}",
        f"annotations/{split}",
        classes,
        reduce_zero_label=True,
        **options,
    )
    return _colour(dataset, "ADE20K")


@DATASETS.register_module()
def Cityscapes(root: str, split: str = "train", **options: Any) -> TransformedMasks:
    """Cityscapes with its fine annotations: the 19 classes that its benchmark evaluates.

    Args:
        root: the folder with leftImg8bit/ and gtFine/.
        split: ``"train"`` or ``"val"``.
        **options: further arguments of :func:`SegmentationFolder`.
    """
    evaluated = _cityscapes()
    dataset = SegmentationFolder(
        root,
        f"leftImg8bit/{split}",
        f"gtFine/{split}",
        [kind.name for kind in evaluated],
        image_suffix="_leftimg8bit.png",
        mask_suffix="_gtFine_labelIds.png",
        label_map={kind.id: kind.train_id for kind in evaluated},
        **options,
    )
    return _colour(dataset, "Cityscapes")


@DATASETS.register_module(name="DigitSegmentation")
def digit_segmentation(
    transforms: Sequence[dict] = (),
    test_mode: bool = False,
    ignore_index: int = IGNORE,
    **scenes: Any,
) -> TransformedMasks:
    """:class:`~linsight.data.digits.DigitSegmentation` under torchvision's transforms.

    Args:
        transforms: see :func:`build_transforms`.
        test_mode, ignore_index: see :class:`TransformedMasks`.
        **scenes: arguments of the class and of
            :func:`~linsight.data.digits.digit_scene`.
    """
    dataset = DigitSegmentation(**scenes)

    return TransformedMasks(
        partial(_read_scene, dataset),
        len(dataset),
        transforms,
        dataset.classes,
        test_mode,
        corrupt_tolerance=0,
        ignore_index=ignore_index,
    )


def _read_scene(dataset: DigitSegmentation, index: int) -> tuple[Image.Image, np.ndarray]:
    image, mask = dataset[index]
    return image, np.asarray(mask)
