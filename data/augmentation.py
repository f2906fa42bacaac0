"""timm's transforms, whole in the data workers or in two halves: views there, pixels on the device.

A worker decodes an image, crops and mirrors it, and draws what remains to be done to it. The
device then augments and normalises the whole batch. The worker draws by running timm's own
transforms on a list in place of an image, so the distribution is timm's, and one seed gives both
the same image, save for rounding and the noise in erased rectangles.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from enum import IntEnum, auto
from functools import lru_cache, partial
from itertools import chain
from typing import Any, NamedTuple, cast

import numpy as np
import timm.data
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data import transforms as crops
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as pixelwise


def posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's posterize, and a black image for 0 bits.

    The noise of RandAugment's magnitude asks for 0 bits at times. Pillow once gave a black image
    for them, and raises an error today.
    """
    return auto_augment.posterize(image, bits, **options) if bits else image.point(lambda _: 0)


def create_transform(settings: dict) -> Callable:
    """:func:`timm.data.create_transform`, whose augmentations posterize by :func:`posterize`."""
    transform = cast(Callable, timm.data.create_transform(**settings))
    for step in getattr(transform, "transforms", ()):
        for operation in _operations(step):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = posterize
    return transform


def effective_settings(settings: dict | None) -> dict:
    """Arguments of :func:`timm.data.create_transform` with its own defaults written down.

    They are what prepares an image in evaluation. A model's ``pretrained_cfg`` has other values
    where the arguments say nothing, and prediction would show the model other pixels.
    """
    settings = dict(settings or {})
    defaults = {
        "input_size": 224,
        "interpolation": "bilinear",
        "crop_pct": timm.data.constants.DEFAULT_CROP_PCT,
        "crop_mode": timm.data.constants.DEFAULT_CROP_MODE,
        "mean": timm.data.IMAGENET_DEFAULT_MEAN,
        "std": timm.data.IMAGENET_DEFAULT_STD,
    }
    return settings | {key: v for key, v in defaults.items() if settings.get(key) is None}


def _operations(step: Any) -> list[Any]:
    """The operations among which a step of timm's draws; none if it is no policy."""
    return [*getattr(step, "ops", ()), *chain(*getattr(step, "policy", ()))]


class Kind(IntEnum):
    """What the device does to an image in one step."""

    NOTHING = 0
    TABLE = auto()
    NEAREST = auto()
    BILINEAR = auto()
    BICUBIC = auto()
    SATURATION = auto()
    CONTRAST = auto()
    SHARPNESS = auto()
    AUTOCONTRAST = auto()
    EQUALIZE = auto()


class Views(NamedTuple):
    """A batch of views in 8 bits, and what remains to be done to them; an item lacks the axis B.

    Attributes:
        pixels: uint8 (B, 3, H, W).
        kinds: int64 (B, S), the :class:`Kind` of each step.
        arguments: float32 (B, S, 6). Affine steps have the matrix that takes a place of the
            result, in [-1, 1], to one of the image; enhancements have their factor first.
        tables: uint8 (B, S, 256), the new values of a step by table.
        boxes: int64 (B, N, 4), top, bottom, left and right of the rectangles to erase.
        statistics: float32 (B, 2, 3), mean and standard deviation that normalise the image.
        noise: int64 (B, 3), the shape of the noise that fills them, spread over the image; zeros
            where they become 0.
    """

    pixels: Tensor
    kinds: Tensor
    arguments: Tensor
    tables: Tensor
    boxes: Tensor
    statistics: Tensor
    noise: Tensor


# All 256 values: what an operation that looks at one value makes of them is its table.
_RAMP = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
_BY_TABLE = {
    auto_augment.posterize: posterize,
    **{
        function: function
        for function in (
            auto_augment.brightness,
            auto_augment.invert,
            auto_augment.solarize,
            auto_augment.solarize_add,
        )
    },
}
_BY_FACTOR = {
    auto_augment.color: Kind.SATURATION,
    auto_augment.contrast: Kind.CONTRAST,
    auto_augment.sharpness: Kind.SHARPNESS,
}
_BY_HISTOGRAM = {
    auto_augment.auto_contrast: Kind.AUTOCONTRAST,
    auto_augment.equalize: Kind.EQUALIZE,
}


def _rotation(width: int, height: int, degrees: float) -> tuple[float, ...]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


# From (width, height, argument) to Pillow's matrix from a pixel of the result to one of the image.
_BY_MATRIX: dict[Callable, Callable[[int, int, float], tuple[float, ...]]] = {
    auto_augment.rotate: _rotation,
    auto_augment.shear_x: lambda width, height, factor: (1, factor, 0, 0, 1, 0),
    auto_augment.shear_y: lambda width, height, factor: (1, 0, 0, factor, 1, 0),
    auto_augment.translate_x_rel: lambda width, height, share: (1, 0, share * width, 0, 1, 0),
    auto_augment.translate_y_rel: lambda width, height, share: (1, 0, 0, 0, 1, share * height),
}
_JITTERS = (auto_augment.brightness, auto_augment.contrast, auto_augment.color)
_PLACES = (
    transforms.RandomHorizontalFlip,
    transforms.RandomVerticalFlip,
    crops.RandomResizedCropAndInterpolation,
    crops.ResizeKeepRatio,
    crops.CenterCropOrPad,
    crops.RandomCropOrPad,
)


class _Boxes:
    """Stands for an image and notes the rectangles that timm's random erasing fills."""

    dtype = torch.uint8

    def __init__(self, height: int, width: int) -> None:
        self.shape = (3, height, width)
        self.boxes: list[tuple[int, int, int, int]] = []

    def size(self) -> tuple[int, int, int]:
        return self.shape

    def __setitem__(self, place: tuple[slice, slice, slice], value: Tensor) -> None:
        _, rows, columns = place
        self.boxes.append((rows.start, rows.stop, columns.start, columns.stop))


class ViewTransform:
    """The workers' half of timm's transform for training; :func:`augment` is the device's half.

    Args:
        settings: arguments of :func:`timm.data.create_transform`.

    Raises:
        ValueError: the settings ask for a step that has no such halves.
    """

    def __init__(self, settings: dict) -> None:
        if not settings.get("is_training") or settings.get("no_aug"):
            raise ValueError(
                f"augment_on_device is for training, and the transform has is_training="
                f"{settings.get('is_training', False)} and no_aug={settings.get('no_aug', False)}: "
                "leave augment_on_device out"
            )
        steps = cast(Any, timm.data.create_transform(**settings, separate=True))
        places, self.policies, finish = (list(step.transforms) for step in steps)
        self.crop = places.pop(0)
        self.flips = transforms.Compose(places)
        self.erasing = finish.pop() if isinstance(finish[-1], RandomErasing) else None
        ends = [crops.MaybeToTensor, transforms.Normalize]
        for step in [self.crop, *places]:
            if type(step) not in _PLACES:
                raise _no_halves(step)
        for step in finish:
            if type(step) not in ends or len(finish) != len(ends):
                raise _no_halves(step)
        size = settings.get("input_size", 224)
        self.height, self.width = size[-2:] if isinstance(size, Sequence) else (size, size)
        if self.crop.interpolation == InterpolationMode.NEAREST:
            # torchvision's others are half a pixel beside Pillow's.
            self.crop.interpolation = InterpolationMode.NEAREST_EXACT
        chosen = self.crop.interpolation
        self.interpolations = tuple(chosen) if isinstance(chosen, tuple) else (chosen,)
        for interpolation in self.interpolations:
            if interpolation.value not in ("nearest-exact", "bilinear", "bicubic"):
                raise _no_halves(f"interpolation={interpolation.value!r}")
        self.steps = sum(map(self._prepare, self.policies))
        self.statistics = torch.tensor([list(settings["mean"]), list(settings["std"])])
        self.noise = torch.tensor((0, 0, 0))
        if self.erasing is not None:
            shapes = {"pixel": (3, self.height, self.width), "rand": (3, 1, 1)}
            self.noise = torch.tensor(shapes.get(self.erasing.mode, (0, 0, 0)))
            # Here it draws rectangles alone.
            self.erasing.per_pixel = self.erasing.rand_color = False
            self.erasing.device = "cpu"

    def _prepare(self, policy: Any) -> int:
        """Have a policy note its operations, and return how many it applies at most."""
        if isinstance(policy, transforms.ColorJitter) and policy.hue is None:
            return len(_JITTERS)
        if isinstance(policy, auto_augment.RandAugment):
            steps = policy.num_layers
        elif isinstance(policy, auto_augment.AutoAugment):
            steps = max(map(len, policy.policy))
        else:
            raise _no_halves(policy)
        known = {*_BY_TABLE, *_BY_FACTOR, *_BY_HISTOGRAM, *_BY_MATRIX}
        for operation in _operations(policy):
            if operation.aug_fn not in known:
                raise _no_halves(operation)
            operation.aug_fn = partial(_note, operation.aug_fn)
        return steps

    def decode(self, image: Image.Image) -> Tensor:
        """A view of an image, uint8 (3, H, W): timm's crop, resized and mirrored.

        An image that has been opened but not read is decoded at the smallest of libjpeg's scales
        that leaves the crop as large as the view.
        """
        crop = self.crop
        if not isinstance(crop, crops.RandomResizedCropAndInterpolation):
            return self.flips(crop(_to_tensor(image)))
        top, left, height, width = crop.get_params(image, crop.scale, crop.ratio)
        # Of an image of a pixel or two timm at times draws a side of 0.
        height, width = max(height, 1), max(width, 1)
        top, left = min(top, image.height - height), min(left, image.width - width)
        interpolation = self.interpolations[0]
        if len(self.interpolations) > 1:
            interpolation = random.choice(self.interpolations)
        box = left, top, left + width, top + height
        full, scale = image.size, min(width // self.width, height // self.height)
        # Only a JPEG that has not been read has a draft.
        draft = scale > 1 and image.draft(None, (full[0] // scale, full[1] // scale))
        if draft:
            # Pillow's resize takes twice as long as torchvision's, and takes a box of fractions.
            x, y = (drafted / side for drafted, side in zip(draft[1][2:], full, strict=True))
            box = box[0] * x, box[1] * y, box[2] * x, box[3] * y
            resample = Image.Resampling[interpolation.name.removesuffix("_EXACT")]
            image = image.convert("RGB").resize((self.width, self.height), resample, box)
            return self.flips(_to_tensor(image))
        pixels = _to_tensor(image.crop(box))
        return self.flips(pixelwise.resize(pixels, [self.height, self.width], interpolation))

    def draw(self, pixels: Tensor) -> Views:
        """The view with what timm's transform would do to it, drawn at random.

        Args:
            pixels: uint8 (3, H, W).
        """
        notes: list = []
        for policy in self.policies:
            if isinstance(policy, transforms.ColorJitter):
                jitter = cast(Any, (policy.brightness, policy.contrast, policy.saturation, None))
                order, *factors = policy.get_params(*jitter)
                for index in order.tolist():
                    if index < len(_JITTERS) and factors[index] is not None:
                        _note(_JITTERS[index], notes, factors[index])
            else:
                policy(notes)
        kinds = np.zeros(self.steps, np.int64)
        arguments = np.zeros((self.steps, 6), np.float32)
        tables = np.zeros((self.steps, 256), np.uint8)
        for step, (function, values, resample) in enumerate(notes):
            if function in _BY_TABLE:
                kinds[step] = Kind.TABLE
                tables[step] = _table(function, *values)
            elif function in _BY_MATRIX:
                kinds[step] = Kind[Image.Resampling(resample).name]
                matrix = _BY_MATRIX[function](self.width, self.height, *values)
                arguments[step] = _normalise(matrix, self.width, self.height)
            elif function in _BY_FACTOR:
                kinds[step], arguments[step, 0] = _BY_FACTOR[function], values[0]
            else:
                kinds[step] = _BY_HISTOGRAM[function]
        erasing, canvas = self.erasing, _Boxes(self.height, self.width)
        if erasing is not None:
            erasing(canvas)
        boxes = np.zeros((erasing.max_count if erasing is not None else 0, 4), np.int64)
        boxes[: len(canvas.boxes)] = canvas.boxes or boxes[:0]
        return Views(
            pixels,
            torch.from_numpy(kinds),
            torch.from_numpy(arguments),
            torch.from_numpy(tables),
            torch.from_numpy(boxes),
            self.statistics,
            self.noise,
        )

    def __call__(self, image: Image.Image) -> Views:
        return self.draw(self.decode(image))


# Pillow takes longer than all other draws for a table, and most arguments are whole numbers.
@lru_cache(maxsize=1024)
def _table(function: Callable, *values: float) -> np.ndarray:
    return np.asarray(_BY_TABLE[function](_RAMP, *values))[0]


def _no_halves(step: Any) -> ValueError:
    return ValueError(
        f"augment_on_device does not know {step}: leave augment_on_device out, or the setting of "
        "the transform that asks for it"
    )


def _note(
    function: Callable, notes: list, *arguments: float, resample: Any = None, **_: Any
) -> list:
    """Takes the place of one of timm's operations, and of its image a list of what to do."""
    if function in _BY_MATRIX and isinstance(resample, Sequence):
        resample = random.choice(resample)
    notes.append((function, arguments, resample))
    return notes


def _normalise(matrix: Sequence[float], width: int, height: int) -> tuple[float, ...]:
    """A matrix between pixels as one between places in [-1, 1]."""
    a, b, c, d, e, f = matrix
    b, d = b * height / width, d * width / height
    return a, b, a + b + 2 * c / width - 1, d, e, d + e + 2 * f / height - 1


def _to_tensor(image: Image.Image) -> Tensor:
    """The pixels of an image, uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def augment(views: Views, device: torch.device | str) -> Tensor:
    """Images for the model, normalised, float32 (B, 3, H, W), on a device.

    It computes what timm's transform computes with Pillow. Nothing waits for the device: the
    images of one step that share an operation are found on the host.

    Args:
        views: a batch on the host. Its memory is left as it is.
        device: where to compute.
    """

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    # mmengine calls this under autocast.
    with torch.autocast(torch.device(device).type, enabled=False):
        images = views.pixels.to(device, non_blocking=True, copy=True)
        order = views.kinds.argsort(0)
        counts = [row.bincount().tolist() for row in views.kinds.T]
        order, arguments, tables, statistics = map(
            move, (order, views.arguments, views.tables, views.statistics)
        )
        # timm fills with the mean as a colour, in 8 bits.
        fill = statistics[:, 0].mul(255).round_().clamp_(max=255)[:, :, None, None]
        for step, numbers in enumerate(counts):
            start = 0
            for kind, count in enumerate(numbers):
                rows = order[start : start + count, step]
                start += count
                if kind == Kind.NOTHING or not count:
                    continue
                chosen = images[rows]
                if kind == Kind.TABLE:
                    chosen = _look_up(chosen, tables[rows, step])
                elif kind in _MOVES:
                    chosen = _move_pixels(chosen, arguments[rows, step], fill[rows], Kind(kind))
                elif kind in _ENHANCEMENTS:
                    chosen = _enhance(chosen, arguments[rows, step, :1], Kind(kind))
                else:
                    chosen = _EQUALIZATIONS[Kind(kind)](chosen)
                images.index_copy_(0, rows, chosen)
        mean, deviation = statistics[..., None, None].unbind(1)
        result = images.float().div_(255).sub_(mean).div_(deviation)
        return _erase(result, views)


def _look_up(images: Tensor, tables: Tensor) -> Tensor:
    return tables.gather(1, images.flatten(1).long()).view_as(images)


def _gray(images: Tensor) -> Tensor:
    return pixelwise.rgb_to_grayscale(images).round_()


def _gray_mean(images: Tensor) -> Tensor:
    return _gray(images).mean((1, 2, 3), keepdim=True).round_()


def _smooth(images: Tensor) -> Tensor:
    """Pillow's filter ``SMOOTH``: a mean over 3 x 3 pixels, the middle one five times as heavy."""
    smooth = images.clone()
    inner = smooth[..., 1:-1, 1:-1]
    inner.mul_(4 / 13).add_(avg_pool2d(images, 3, 1), alpha=9 / 13).round_()
    return smooth


# The image of factor 0; factor 1 leaves an image as it is, and what lies beyond leads away.
_ENHANCEMENTS = {Kind.SATURATION: _gray, Kind.CONTRAST: _gray_mean, Kind.SHARPNESS: _smooth}
_EQUALIZATIONS = {Kind.AUTOCONTRAST: pixelwise.autocontrast, Kind.EQUALIZE: pixelwise.equalize}


def _enhance(images: Tensor, factors: Tensor, kind: Kind) -> Tensor:
    pixels = images.float()
    blend = torch.lerp(_ENHANCEMENTS[kind](pixels), pixels, factors[:, :, None, None])
    return blend.clamp_(0, 255).to(torch.uint8)


_MOVES = (Kind.NEAREST, Kind.BILINEAR, Kind.BICUBIC)


def _move_pixels(images: Tensor, matrices: Tensor, fill: Tensor, kind: Kind) -> Tensor:
    """Each result's pixel from where its matrix points to; `fill` where that is outside.

    The grid is not one of :func:`torch.nn.functional.affine_grid`, whose matrix product is in TF32
    where the user allows it: 10 bits do not tell the pixels of a row apart.
    """
    height, width = images.shape[-2:]
    y, x = (
        torch.arange(1 - side, side, 2, device=images.device) / side for side in (height, width)
    )
    a, b, c, d, e, f = matrices[..., None, None].unbind(1)
    y = y[:, None]
    grid = torch.stack((a * x + b * y + c, d * x + e * y + f), -1)
    outside = ((grid < -1) | (grid >= 1)).any(-1)[:, None]
    mode = kind.name.lower()
    moved = grid_sample(images.float(), grid, mode, padding_mode="border", align_corners=False)
    return torch.where(outside, fill, moved.clamp_(0, 255)).to(torch.uint8)


def _erase(images: Tensor, views: Views) -> Tensor:
    """Fill the boxes of each image, in place, with normal noise or with 0."""
    height, width = images.shape[-2:]
    y, x = (torch.arange(side, device=images.device) for side in (height, width))
    shape = views.noise[0].tolist()
    for boxes in views.boxes.unbind(1):
        rows = (boxes[:, 1] > 0).nonzero()[:, 0]
        if not len(rows):
            continue
        box = boxes[rows].to(images.device, non_blocking=True)
        top, bottom, left, right = box[..., None].unbind(1)
        within = ((y >= top) & (y < bottom))[:, None, :, None]
        within = within & ((x >= left) & (x < right))[:, None, None, :]
        rows = rows.to(images.device, non_blocking=True)
        noise = torch.randn(len(rows), *shape, device=images.device) if any(shape) else 0.0
        images.index_copy_(0, rows, torch.where(within, noise, images[rows]))
    return images
