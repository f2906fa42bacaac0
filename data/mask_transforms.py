"""torchvision's transforms of images and their masks, and those of segmentation that it lacks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import cv2
import numpy as np
import torch
from mmengine.registry import TRANSFORMS
from timm.data import IMAGENET_DEFAULT_MEAN
from torchvision import tv_tensors
from torchvision.transforms import v2

from .loading import DataError
from .masks import IGNORE


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
