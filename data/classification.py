"""Classification data sets as mmengine trains on them: timm's readers and transforms."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm.data
import torch
from mmengine.dist import get_dist_info, sync_random_seed
from mmengine.registry import DATA_SAMPLERS, DATASETS
from PIL import Image
from timm.data.distributed_sampler import RepeatAugSampler as TimmRepeatAugSampler
from timm.data.readers.class_map import load_class_map
from timm.data.readers.img_extensions import get_img_extensions, set_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder, find_images_and_targets
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose

from .augmentation import Views, ViewTransform, create_transform, effective_settings
from .digits import DigitClassification
from .lists import ListReader
from .loading import DataError, TolerantDataset
from .pictures import folders_in, is_hidden, prepare, read_picture
from .sources import ENDINGS, split_samples

_SPLITS = ("train", "training", "val", "validation", "eval", "test")


class TransformedImages(TolerantDataset):
    """A data set of (PIL image, label) under timm's transform.

    Args:
        read: returns the PIL image and the label at an index.
        length: number of images.
        transform: arguments of :func:`timm.data.create_transform`.
        classes: names of the classes.
        name_of: returns the file name of the image at an index.
        corrupt_tolerance: the largest share of images that may be unreadable.
        augment_on_device: leave all that comes after cropping and mirroring to
            :class:`~linsight.heads.classification.LabelledImages`. The items then have
            :class:`~linsight.data.augmentation.Views` for images.
        label_of: returns the label at an index without reading the image, or None.

    Raises:
        DataError: when an item is read whose label belongs to no class.
    """

    def __init__(
        self,
        read: Callable[[int], tuple[Image.Image, int]],
        length: int,
        transform: dict | None,
        classes: Sequence[str] | None = None,
        name_of: Callable[[int], str] = str,
        corrupt_tolerance: float = 0.01,
        augment_on_device: bool = False,
        label_of: Callable[[int], int] | None = None,
    ) -> None:
        self.transform, self.metainfo = _transform(transform, classes, augment_on_device)
        self.augment_on_device = augment_on_device

        if augment_on_device:  # A damaged file may show when it is decoded.
            read = partial(_decode, read, self.transform)
        super().__init__(read, length, name_of, corrupt_tolerance, label_of)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | Views, int]:
        index, (image, label) = self.read_from(index)
        count = len(self.metainfo.get("classes", ()))
        if count and not 0 <= label < count:
            raise DataError(
                f"the label of {self.name_of(index)} is {label}, and there are {count} classes: "
                f"labels are 0 to {count - 1}; number the classes so in class_map"
            )
        finish = self.transform.draw if self.augment_on_device else self.transform
        return finish(image), label


def _transform(
    transform: dict | None, classes: Sequence[str] | None, augment_on_device: bool
) -> tuple[Any, dict]:
    settings = effective_settings(transform)
    metainfo = {"mean": list(settings["mean"]), "std": list(settings["std"])}
    if classes is not None:
        metainfo["classes"] = [str(name) for name in classes]
    make = ViewTransform if augment_on_device else create_transform
    return make(settings), metainfo


@DATASETS.register_module()
def TimmDataset(
    root: str,
    name: str = "",
    split: str = "train",
    transform: dict | None = None,
    corrupt_tolerance: float = 0.01,
    class_map: str | dict | None = None,
    augment_on_device: bool = False,
    annotations: str | None = None,
    classes: Sequence[str] = (),
    part: Mapping[str, Any] | None = None,
    **reader: Any,
) -> Dataset:
    """A data set that :func:`timm.data.create_dataset` reads, under timm's transform.

    With ``name=""`` it is a folder with one sub-folder per class, or a tar file of one; images in
    folders within a class's folder are of this class, unless `class_map` names them. A prefix
    of ``name`` selects another reader: ``torch/`` for torchvision's data sets, ``hfds/`` and
    ``hfids/`` for Hugging Face's, ``wds/`` for webdataset, ``tfds/`` for TensorFlow's. Streamed
    data sets (``hfids/``, ``wds/``, ``tfds/``) have an order of their own: set ``sampler=None``
    in the data loader.

    Args:
        root: the folder. If it has a sub-folder named like the split, that one is read. Hugging
            Face's data sets are cached in it.
        name: prefix of the reader and name of the data set.
        split: ``"train"``, ``"validation"``, or the reader's own name of a split.
        transform: arguments of :func:`timm.data.create_transform`.
        corrupt_tolerance: the largest share of images that may be unreadable; 0 allows none.
        class_map: a dict from class names to indices, or a file that holds one.
        augment_on_device: as for :class:`TransformedImages`. JPEGs are then decoded at a reduced
            size where the crop allows it, unless the data set is streamed.
        annotations: a CSV file with the columns file and label, in place of a folder for each
            class; names of files start from `root`.
        classes: names of the classes in `annotations`, in the order of their indices.
        part: of a Hugging Face data set without a split to validate on, a dict of ``share`` and
            ``seed``, by which images of each class are drawn, and of ``name``: "val" are the drawn
            ones, "train" the others.
        **reader: further arguments of :func:`timm.data.create_dataset`.

    Raises:
        DataError: the folder is missing, it holds no images, one of its classes has none, or
            images lie in no class's folder.
    """
    if annotations is not None:
        reader["reader"] = ListReader(annotations, root, classes)
    folder = (not name or name == "folder") and annotations is None
    if folder and not os.path.exists(root):
        raise DataError(
            f"data set root {root!r} does not exist: set data_root in the config, or "
            "train_dataloader.dataset.root and val_dataloader.dataset.root"
        )
    mode = reader.get("input_img_mode", "RGB")
    if name.startswith(("hfids/", "wds/")):
        reader["input_img_mode"] = ""  # the transform converts the picture
    if name in ("torch/folder", "torch/image_folder"):
        reader.setdefault("allow_empty", True)  # a hidden folder is no class
    try:
        reader["class_map"] = class_map or ""
        create = timm.data.ImageDataset if annotations else partial(timm.data.create_dataset, name)
        with _all_endings():
            dataset = create(root=root, split=split, **reader)
    except RuntimeError as error:
        raise DataError(f"data set root {root!r}, split {split!r}: {error}") from error
    if isinstance(dataset, IterableDataset):
        apply, metainfo = _transform(transform, None, augment_on_device)
        dataset.transform = Compose([partial(_convert, mode=mode), apply])
        vars(dataset)["metainfo"] = metainfo
        return dataset
    if not isinstance(dataset, timm.data.ImageDataset):
        others = cast(Any, dataset)
        if isinstance(dataset, ImageFolder):
            _leave_out_hidden(dataset)
        if hasattr(others, "loader"):  # that of torchvision's folders loses 16 bits
            others.loader = read_picture
        return TransformedImages(
            partial(_read_item, dataset),
            len(dataset),
            transform,
            getattr(others, "classes", None),
            str,
            corrupt_tolerance,
            augment_on_device,
        )

    images = cast(Any, dataset.reader)
    if isinstance(images, ReaderImageFolder):
        images.samples = _find_pictures(images, class_map, reader.get("input_key"))
    if part is not None:
        _take_part(images, **part)
    if folder and os.path.isdir(root):
        _check_folder(Path(root), split, images, mapped=bool(class_map))
    if isinstance(images, ReaderImageFolder):
        _label_by_top_folder(images, class_map)
    elif isinstance(images, ReaderImageInTar):
        _leave_out_hidden_in_tar(images, mapped=bool(class_map))
        _check_tar(images)

    indices = getattr(images, "class_to_idx", None)
    return TransformedImages(
        partial(_read_file, images, None if augment_on_device else dataset.input_img_mode),
        len(dataset),
        transform,
        sorted(indices, key=indices.get) if indices else None,
        partial(_name_file, images),
        corrupt_tolerance,
        augment_on_device,
        partial(_label_sample, images) if hasattr(images, "samples") else None,
    )


@contextmanager
def _all_endings() -> Iterator[None]:
    """Let timm's readers find pictures of the formats that all commands read; their own are PNG and
    JPEG, and leave others out unsaid."""
    before = get_img_extensions()
    set_img_extensions(ENDINGS)
    try:
        yield
    finally:
        set_img_extensions(before)


def _take_part(images: Any, name: str, share: float, seed: int) -> None:
    """Leave one part of the split in timm's reader of a Hugging Face data set, in place."""
    labels = images.dataset[images.label_key]
    parts = split_samples(range(len(labels)), lambda index: labels[index], share, seed)
    images.dataset = images.dataset.select(parts[name == "val"])
    images.num_samples = len(images.dataset)


def _decode(read: Callable, transform: ViewTransform, index: int) -> tuple[Any, int]:
    image, label = read(index)
    return transform.decode(image), label


def _read_item(dataset: Any, index: int) -> tuple[Image.Image, int]:
    image, label = dataset[index]
    return prepare(image), label


def _read_file(images: Any, mode: str | None, index: int) -> tuple[Image.Image, int]:
    """The image and label at an index of one of timm's readers; a mode of None converts none."""
    file, label, *_ = images[index]
    if mode is None:
        return prepare(Image.open(file)), label
    with Image.open(file) as image:
        return _convert(image, mode), label


def _name_file(images: Any, index: int) -> str:
    # An image that a Hugging Face data set holds as bytes may have no file name.
    return images.filename(index) or str(index)


def _label_sample(images: Any, index: int) -> int:
    return images.samples[index][1]


def _convert(image: Image.Image, mode: str) -> Image.Image:
    picture = prepare(image)
    return picture.convert(mode or picture.mode)


def _inner(images: Any, file: str) -> str:
    """The path of a reader's file within its folder, whose own path the file's begins with."""
    return file[len(str(images.root)) :].lstrip(os.sep)


def _leave_out_hidden(dataset: ImageFolder) -> None:
    """Leave hidden files and folders out of torchvision's data set, and classes that only they
    have.

    Raises:
        DataError: a class has no image left.
    """
    kept = [s for s in dataset.samples if not is_hidden(_inner(dataset, s[0]))]
    filled = {number for _, number in kept}
    empty = [name for name, number in dataset.class_to_idx.items() if number not in filled]
    empty = [name for name in empty if not is_hidden(name)]
    if empty or not kept:
        raise DataError(
            f"the class folders in '{dataset.root}' hold no images: {', '.join(empty[:5])}"
        )
    dataset.classes = [name for name in dataset.classes if not is_hidden(name)]
    numbers = {name: number for number, name in enumerate(dataset.classes)}
    names = {number: name for name, number in dataset.class_to_idx.items()}
    dataset.class_to_idx = numbers
    dataset.samples = dataset.imgs = [(file, numbers[names[number]]) for file, number in kept]
    dataset.targets = [number for _, number in dataset.samples]


def _leave_out_hidden_in_tar(images: ReaderImageInTar, mapped: bool) -> None:
    """Leave hidden files and folders out of a tar file, and, unless a class map names the classes,
    those that only they have.

    Raises:
        DataError: nothing is left.
    """
    kept = [i for i, (info, _, _) in enumerate(images.samples) if not is_hidden(info.path)]
    if not kept:
        raise DataError(f"data set root '{images.root}' holds no images")
    images.samples, images.targets = images.samples[kept], images.targets[kept]
    if not mapped:
        shown, images.targets = np.unique(images.targets, return_inverse=True)
        names = [images.class_idx_to_name[number] for number in shown.tolist()]
        images.class_name_to_idx = {name: number for number, name in enumerate(names)}
        images.class_idx_to_name = dict(enumerate(names))


def _find_pictures(
    images: ReaderImageFolder, class_map: Any, endings: str | None
) -> list[tuple[str, int]]:
    """The files of a folder that are not hidden, with timm's labels."""
    found = images.samples
    if class_map:  # timm leaves out those whose innermost folder it does not name
        types = endings.split(";") if endings else ENDINGS
        found, _ = find_images_and_targets(images.root, types=types)
    return [sample for sample in found if not is_hidden(_inner(images, sample[0]))]


def _label_by_top_folder(images: ReaderImageFolder, class_map: Any) -> None:
    """Label the images by the folders of the classes; timm's labels are the innermost folders.

    Raises:
        DataError: images lie beside the folders of the classes, or all in one folder of folders.
    """
    files = [file for file, _ in images.samples]
    folders = [_inner(images, file).split(os.sep)[:-1] for file in files]
    known = load_class_map(class_map, images.root) if class_map else None
    stray = [file for file, parts in zip(files, folders, strict=True) if not parts]
    if stray and known is None:
        raise DataError(
            f"{len(stray)} of {len(files):,} images in '{images.root}' are in no class's folder: "
            f"{', '.join(map(str, stray[:3]))}{', ...' if len(stray) > 3 else ''}; move them into "
            "a folder per class"
        )
    tops = {parts[0] for parts in folders if parts}
    if known is None and len(tops) == 1 and min(map(len, folders)) > 1:
        (top,) = tops
        raise DataError(
            f"data set root '{images.root}' holds the one folder '{top}' of folders: set the root "
            f"to '{images.root}/{top}' if these are the classes"
        )
    if known is None:
        known = {top: label for label, top in enumerate(sorted(tops, key=natural_key))}
    # With a class map the outermost folder that it names is the class.
    named = (next((part for part in parts if part in known), None) for parts in folders)
    images.samples = [
        (file, known[name]) for file, name in zip(files, named, strict=True) if name is not None
    ]
    images.class_to_idx = known


def _check_tar(images: ReaderImageInTar) -> None:
    """Refuse a tar file whose images lie at several depths, of which timm takes the innermost.

    Raises:
        DataError: the classes are not all at one depth.
    """
    depths = {len(Path(info.path).parts) for info, _, within in images.samples if within is None}
    if len(depths) > 1:
        raise DataError(
            f"data set root '{images.root}' has images in folders at several depths, which leaves "
            "open which folders are the classes: unpack it, and give the folder as the root"
        )


def _check_folder(root: Path, split: str, images: Any, mapped: bool) -> None:
    taken = Path(images.root)
    if taken == root and any((root / other).is_dir() for other in _SPLITS):
        raise DataError(
            f"data set root '{root}' has folders {', '.join(sorted(os.listdir(root))[:4])} "
            f"but none for split {split!r}"
        )
    filled = {_inner(images, file).split(os.sep, 1)[0] for file, _ in images.samples}
    empty = [entry.name for entry in folders_in(taken) if entry.name not in filled]
    if not filled:
        raise DataError(f"data set root '{taken}' holds no images in folders of classes")
    # With a class map the labels do not depend on which folders have images.
    if empty and not mapped:
        raise DataError(
            f"{len(empty)} class folders in '{taken}' hold no images: {', '.join(empty[:5])}"
            f"{', ...' if len(empty) > 5 else ''}. The labels of the classes after them would "
            "shift: fill or remove the folders, or number the classes with class_map"
        )


@DATASETS.register_module(name="DigitClassification")
def digit_classification(transform: dict | None = None, **scenes: Any) -> TransformedImages:
    """:class:`~linsight.data.digits.DigitClassification` under timm's transform.

    Args:
        transform: arguments of :func:`timm.data.create_transform`.
        **scenes: arguments of the class and of
            :func:`~linsight.data.digits.digit_scene`.
    """
    dataset = DigitClassification(**scenes)
    return TransformedImages(
        dataset.__getitem__, len(dataset), transform, dataset.classes, corrupt_tolerance=0
    )


@DATA_SAMPLERS.register_module()
class RepeatAugSampler(TimmRepeatAugSampler):
    """timm's repeated augmentation, seeded by mmengine.

    An epoch holds ``num_repeats`` views of each image that it draws, and draws fewer images in
    the same proportion.

    Args:
        dataset: the data set to draw from.
        seed: seed of the order, the same on all ranks; by default mmengine's.
        num_repeats: number of views per image and epoch.
        selected_round: the number of samples per epoch and rank is rounded down to a multiple of
            this.
        selected_ratio: each rank draws 1 / selected_ratio of the data set per epoch; 0 stands for
            the number of ranks.
    """

    def __init__(
        self,
        dataset: Dataset,
        seed: int | None = None,
        num_repeats: int = 3,
        selected_round: int = 256,
        selected_ratio: int = 0,
    ) -> None:
        rank, ranks = get_dist_info()
        super().__init__(
            dataset,
            num_replicas=ranks,
            rank=rank,
            num_repeats=num_repeats,
            selected_round=selected_round,
            selected_ratio=selected_ratio,
        )
        self.seed = sync_random_seed() if seed is None else seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(self.seed + epoch)
