"""Data sets of images and label masks for mmengine, under torchvision's transforms.

A mask holds the class of each pixel; pixels of the value ``ignore_index``, by default
:data:`IGNORE`, belong to no class.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import torch
from mmengine.logging import print_log
from mmengine.registry import DATASETS, TRANSFORMS
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import tv_tensors
from torchvision.datasets import Cityscapes as TorchvisionCityscapes
from torchvision.transforms import v2

from .digits import DigitSegmentation
from .lists import read_pairs
from .loading import DataError, TolerantDataset, flags, some
from .pictures import files_in, read_picture, turn
from .sources import ENDINGS

IGNORE = 255
# So many masks are looked at before training.
_LOOKED_AT = 32


def build_transforms(settings: Sequence[dict], ignore_index: int = IGNORE) -> v2.Compose:
    """torchvision's transforms in the given order, each by its import path or registered name.

    What lies outside the image after a transform belongs to no class: the ``fill`` of a transform
    is that of the image alone.

    Args:
        settings: as in this example::

            [dict(type="torchvision.transforms.v2.RandomHorizontalFlip", p=0.5),
             dict(type="RandomClassCrop", size=512)]

        ignore_index: value of such pixels in a mask.
    """
    built = [_build_transform(setting, ignore_index) for setting in settings]
    return v2.Compose(built or [v2.Identity()])


def _build_transform(settings: dict, ignore_index: int) -> Callable:
    settings = dict(settings)
    if "transforms" in settings:  # a transform that applies others, such as RandomApply
        inner = settings["transforms"]
        settings["transforms"] = [_build_transform(each, ignore_index) for each in inner]
    try:
        kind: Any = TRANSFORMS.get(settings["type"])
        arguments = inspect.signature(kind).parameters if kind else {}
        _check_takes_masks(settings["type"], kind)
        if "fill" in arguments and kind.__module__.startswith("torchvision."):
            fill = settings.get("fill", arguments["fill"].default)
            settings["fill"] = {
                tv_tensors.Mask: ignore_index,
                _Labels: ignore_index,
                "others": fill,
            }
        if "ignore_index" in arguments:
            settings.setdefault("ignore_index", ignore_index)
        if kind is v2.CenterCrop:
            settings["type"] = partial(_CenterCrop, ignore_index=ignore_index)
        built = TRANSFORMS.build(settings)
    except KeyError as error:
        raise DataError(f"transforms: there is no {settings['type']!r}") from error
    return _AugmentMasks(built) if isinstance(built, _AUTOMATIC) else built


_AUTOMATIC = (v2.AutoAugment, v2.RandAugment, v2.TrivialAugmentWide)
_WITHOUT_MASKS = (
    *(v2.AugMix, v2.MixUp, v2.CutMix, v2.FiveCrop, v2.TenCrop, v2.RandomIoUCrop),
    v2.LinearTransformation,
)


def _check_takes_masks(name: Any, kind: Any) -> None:
    """Refuse torchvision's transforms of images alone, or of labels of another kind.

    Raises:
        DataError: see above.
    """
    module = getattr(kind, "__module__", "")
    old = module.startswith("torchvision.") and not module.startswith("torchvision.transforms.v2")
    if kind in _WITHOUT_MASKS or old:
        fix = f"take torchvision.transforms.v2.{kind.__name__}" if old else "leave it out"
        raise DataError(
            f"transforms: {name} takes no masks: {fix}. Of torchvision.transforms.v2 those that "
            "crop, resize, pad, mirror, turn, shear or change colours take them, and RandAugment, "
            "AutoAugment and TrivialAugmentWide here"
        )


class _Labels(tv_tensors.Image):
    """A mask (1, H, W) as torchvision's automatic augmentations see it: what moves pixels moves
    it, and what changes colours leaves it."""


def _register(functional: Callable, kernel: Callable) -> None:
    v2.functional.register_kernel(functional, _Labels)(kernel)


def _keep(labels: _Labels, *_: Any, **__: Any) -> _Labels:
    return labels


for _change in (
    *(v2.functional.adjust_brightness, v2.functional.adjust_saturation),
    *(v2.functional.adjust_contrast, v2.functional.adjust_sharpness),
    *(v2.functional.posterize, v2.functional.solarize, v2.functional.autocontrast),
    *(v2.functional.equalize, v2.functional.invert),
):
    _register(_change, _keep)


def _move(functional: Callable, labels: Any, *args: Any, **options: Any) -> Any:
    options["interpolation"] = v2.InterpolationMode.NEAREST
    moved = functional(labels.as_subclass(torch.Tensor), *args, **options)
    return type(labels)(moved)


_register(v2.functional.affine, partial(_move, v2.functional.affine_image))
_register(v2.functional.rotate, partial(_move, v2.functional.rotate_image))


class _AugmentMasks(v2.Transform):
    """An automatic augmentation of torchvision, which takes images alone, of images and masks.

    Args:
        augment: the augmentation, whose ``fill`` of `_Labels` is the label to ignore.
    """

    def __init__(self, augment: v2.Transform) -> None:
        super().__init__()
        self.augment = augment

    def forward(self, *inputs: Any) -> Any:
        """The augmented image, or the image and the mask (H, W)."""
        image, *masks = inputs
        state = torch.get_rng_state()
        image = self.augment(image)
        if not masks:
            return image
        # The same draws move the mask as the image.
        torch.set_rng_state(state)
        moved = self.augment(_Labels(masks[0][None]))
        return image, tv_tensors.Mask(moved.as_subclass(torch.Tensor)[0])


class _CenterCrop(v2.CenterCrop):
    """torchvision's crop, which pads what is too small; its masks with `ignore_index`."""

    def __init__(self, size: int | Sequence[int], ignore_index: int) -> None:
        super().__init__(size)
        self.ignore_index = ignore_index

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            lacking = [
                max(0, wanted - side)
                for wanted, side in zip(cast(Any, self.size), inpt.shape[-2:], strict=True)
            ]
            top, left = (side // 2 for side in lacking)
            padding = [left, top, lacking[1] - left, lacking[0] - top]
            inpt = v2.functional.pad(inpt, padding, fill=self.ignore_index)
        return super().transform(inpt, params)


@TRANSFORMS.register_module()
class RandomClassCrop(v2.RandomCrop):
    """A random crop that is not filled by one class; images smaller than the crop are padded.

    Args:
        size: (height, width) of the crop in pixels.
        cat_max_ratio: the largest share of one class among the labelled pixels of a crop. A crop
            in which a class has a larger share is drawn anew.
        tries: the last of at most this many crops is taken whatever it shows.
        ignore_index: label of pixels that belong to no class, by default the data set's.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        cat_max_ratio: float = 0.75,
        tries: int = 10,
        ignore_index: int = IGNORE,
    ) -> None:
        mean = [255 * value for value in IMAGENET_DEFAULT_MEAN]
        fill = {tv_tensors.Image: mean, tv_tensors.Mask: ignore_index}
        super().__init__(size, pad_if_needed=True, fill=fill)
        self.cat_max_ratio = cat_max_ratio
        self.tries = tries
        self.ignore_index = ignore_index

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        mask = next(x for x in flat_inputs if isinstance(x, tv_tensors.Mask))
        for _ in range(self.tries):
            params = super().make_params(flat_inputs)
            crop = self.transform(mask, params)
            counts = torch.bincount(crop[crop != self.ignore_index].flatten().long())
            if (counts > 0).sum() > 1 and counts.max() < self.cat_max_ratio * counts.sum():
                break
        return params


@TRANSFORMS.register_module()
class PhotometricDistortion(v2.Transform):
    """mmsegmentation's distortion of colours, in 8 bits, each of four steps with a chance of 1/2.

    Brightness by up to +-32; contrast by 0.5 to 1.5, which moves the mean as well; saturation by
    0.5 to 1.5 and hue by up to 18 of 180 steps, both in HSV. Contrast comes before saturation and
    hue or after them, with equal chance. mmdet's transform of the name does not clip between the
    steps, and its release 3.3 always swaps channels as well.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        brightness, contrast, saturation, hue, order = torch.rand(5).tolist()
        steps = [
            (_scale, {"offset": 64 * brightness - 32}),
            (_scale, {"factor": 0.5 + contrast}),
            (_saturate, {"factor": 0.5 + saturation}),
            (_turn_hue, {"steps": int(36 * hue) - 18}),
        ]
        chosen = [
            step if coin else None for step, coin in zip(steps, torch.rand(4) < 0.5, strict=True)
        ]
        if order < 0.5:
            chosen.append(chosen.pop(1))
        return {"steps": [step for step in chosen if step is not None]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """The distorted image, uint8 (3, H, W); other inputs as they are."""
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        pixels = inpt.permute(1, 2, 0).contiguous().numpy()
        for function, arguments in params["steps"]:
            pixels = function(pixels, **arguments)
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        return tv_tensors.Image(image)


def _scale(values: np.ndarray, factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
    return np.clip(values.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)


def _saturate(pixels: np.ndarray, factor: float) -> np.ndarray:
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
    hsv[..., 1] = _scale(hsv[..., 1], factor)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def _turn_hue(pixels: np.ndarray, steps: int) -> np.ndarray:
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(np.int32) + steps) % 180
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


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
                fix = f"label_map={_numbers(values)} if these numbers stand for classes, or {fix}"
            raise DataError(
                f"the mask of {name} has the labels {str(bad[:5].tolist())[1:-1]}, and there are "
                f"{classes} classes: labels are 0 to {classes - 1}, or {self.ignore_index} for "
                f"pixels to ignore; set {fix}"
            )
        elif not self.seen[:classes].all():
            self.seen[np.flatnonzero(np.bincount(labelled))] = True


def _numbers(values: Iterable[int]) -> dict[int, int]:
    """A label_map that numbers the values of masks in their order."""
    return {int(value): label for label, value in enumerate(values)}


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
        upright: whether masks are those of upright pictures. A mask's size says otherwise where
            EXIF swaps the sides of its image; False leaves every image as it is stored.
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
    table = _label_table(reduce_zero_label, label_map, ignore_index)
    mask_files = [mask for _, mask in pairs]
    _check_ignored(mask_files, classes, ignore_index, table, label_map is not None)

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
    return picture, labels if labels.ndim > 2 else _classes_of(labels, table)


def _classes_of(numbers: np.ndarray, table: np.ndarray | None) -> np.ndarray:
    if table is None:
        return numbers
    # The last row is that of numbers beyond 16 bits.
    beyond = (numbers < 0) | (numbers >= len(table))
    return table[np.where(beyond, len(table) - 1, numbers)]


def _name_pair(pairs: Sequence[tuple[Path, Path]], root: Path, index: int) -> str:
    return os.path.relpath(pairs[index][0], root)


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


def _label_table(
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


def _check_ignored(
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
        table: as :func:`_label_table` returns it.
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
    labels = dict(zip(numbers, _classes_of(np.array(numbers, int), table).tolist(), strict=True))
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
            f"{message} alone, which {which}: set {set_to}dataset.label_map={_numbers(numbers)} "
            "if these are classes"
        )
    verb = "is" if len(ignored) == 1 else "are"
    message += f", of which {some(ignored, 5)} {verb} ignored ({share:.1%} of the pixels)"
    if absent and (len(looked_at) == len(masks) or len(shown) < 2):
        message += (
            f", and so no pixel of {len(absent)} of the {len(classes)} classes ({some(absent, 5)})"
        )
    fix = _numbers(numbers)
    one_class = table is None and len(shown) < 2 and absent
    if not mapped and (are_grey_levels(numbers) or one_class):
        names = "" if len(numbers) <= len(classes) else f", and name {len(numbers)} classes,"
        kept = {number: label for number, label in labels.items() if 0 <= label < len(classes)}
        kept.pop(ignored[-1], None)
        if table is None:
            kept |= _numbers(range(len(classes)))
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
