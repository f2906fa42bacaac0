"""Augmentation on the device against timm's with Pillow: the same seed gives the same image."""

import io
import random

import numpy as np
import pytest
import timm.data
import torch
from mmengine.registry import DATASETS
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import auto_augment
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import default_collate

import linsight.data.classification  # noqa: F401  registers TimmDataset
from linsight.data.augmentation import ViewTransform, augment, create_transform
from linsight.data.loading import DataError, describe
from linsight.heads.classification import LabelledImages

RECIPE = {
    "input_size": 96,
    "is_training": True,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "re_prob": 0.25,
    "re_mode": "pixel",
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
NAMES = sorted(
    {name for inc in (False, True) for name in auto_augment.rand_augment_choices("", inc)}
)


@pytest.fixture(scope="module")
def photographs():
    """Two photographs of 160 x 107 pixels."""
    pictures = load_sample_images().images
    return [Image.fromarray(picture).resize((160, 107)) for picture in pictures]


def seed(number):
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002  timm draws from it
    torch.manual_seed(number)


def to_8_bits(images, settings):
    mean, std = (torch.tensor(settings[key])[:, None, None] for key in ("mean", "std"))
    return (images * std + mean) * 255


def encode(image, **options):
    file = io.BytesIO()
    image.save(file, **{"format": "JPEG", "quality": 90, **options})
    file.seek(0)
    return file


def pairs(photographs, settings, count):
    """Images by timm and by the two halves, each from one seed, in 8 bits; and the views."""
    whole, halves = create_transform(settings), ViewTransform(settings)
    wanted, views = [], []
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        seed(number)
        wanted.append(whole(photograph))
        seed(number)
        views.append(halves(photograph))
    views = default_collate(views)
    images = torch.stack(wanted), augment(views, "cpu")
    return *(to_8_bits(image, settings) for image in images), views


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("name", NAMES)
def test_each_operation_gives_pillows_image(photographs, name, interpolation, monkeypatch):
    """A policy of this operation alone, whose arguments vary from image to image."""
    policy = "auto_augment_policy_v0"
    monkeypatch.setattr(
        auto_augment,
        policy,
        lambda hparams: [[auto_augment.AugmentOp(name, 1, 7, {**hparams, "magnitude_std": 3})]],
    )
    settings = {
        **RECIPE,
        "auto_augment": "v0",
        "interpolation": interpolation,
        "re_prob": 0,
        "scale": (1, 1),
        "ratio": (1, 1),
        "hflip": 0,
    }
    squares = [photograph.resize((96, 96)) for photograph in photographs]
    wanted, found, _ = pairs(squares, settings, 40)
    difference = (found - wanted).abs()
    # Pillow's cubic is sharper than PyTorch's, a = -0.5 and -0.75; a border may round otherwise.
    moved = any(word in name for word in ("Shear", "Rotate", "Translate"))
    cubic = moved and interpolation == "bicubic"
    assert (difference > (12 if cubic else 1.01)).float().mean() < (2e-3 if moved else 1e-9)
    assert difference.mean() < (0.8 if cubic else 0.25)
    bias = (found - wanted).mean((1, 2, 3)).abs()
    assert bias.max() < 0.2
    spread = found.std((1, 2, 3)) - wanted.std((1, 2, 3))
    assert spread.abs().max() < 1


def test_the_recipes_distribution_is_timms(photographs):
    """The operations are drawn for each image on its own; erased pixels are noise in both."""
    wanted, found, views = pairs(photographs, RECIPE, 200)
    still = (views.kinds == 0).all(1)
    assert 0.15 < still.float().mean() < 0.35
    assert 0.15 < (views.boxes[:, 0, 1] > 0).float().mean() < 0.35
    erased = torch.zeros(200, 1, 96, 96, dtype=torch.bool)
    for mask, (top, bottom, left, right) in zip(erased, views.boxes[:, 0].tolist(), strict=True):
        mask[:, top:bottom, left:right] = True
    difference = (found - wanted).abs().masked_fill(erased, 0)
    assert difference.mean() < 0.5
    assert (difference.mean((1, 2, 3)) > 2).float().mean() < 0.05
    for moment in (torch.mean, torch.std):
        assert abs(moment(found) - moment(wanted)) < 0.3
    histograms = [
        torch.histc(images[~erased.expand_as(images)].round(), 256, 0, 255)
        for images in (found, wanted)
    ]
    distance = (histograms[0] - histograms[1]).abs().sum() / histograms[1].sum()
    assert distance < 0.02
    noise = [images[erased.expand_as(images)] for images in (found, wanted)]
    assert abs(noise[0].mean() - noise[1].mean()) < 1
    assert abs(noise[0].std() - noise[1].std()) < 1


@pytest.mark.parametrize(
    "change",
    [
        {"auto_augment": "original-mstd0.5"},
        {"auto_augment": "rand-n3-tweights", "interpolation": "random"},
        {"auto_augment": None, "color_jitter": (0.4, 0.3, 0.2)},
        {"train_crop_mode": "rkrc", "vflip": 0.5},
        {"interpolation": "nearest"},
        {"interpolation": "nearest", "train_crop_mode": "rkrc"},
        {"input_size": (3, 64, 96), "re_mode": "const", "re_count": 3},
    ],
    ids=str,
)
def test_other_settings_of_timm(photographs, change):
    settings = {**RECIPE, "re_mode": "const", **change}
    wanted, found, _ = pairs(photographs, settings, 40)
    assert wanted.shape == found.shape
    difference = (found - wanted).abs().mean((1, 2, 3))
    assert difference.median() < 1
    assert difference.mean() < 1.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_training": False}, "is_training=False"),
        ({"no_aug": True}, "no_aug=True"),
        ({"auto_augment": "augmix-m3"}, "AugMix"),
        ({"auto_augment": "rand-m9-t3a"}, "Desaturate"),
        ({"auto_augment": None, "color_jitter": (0.4, 0.4, 0.4, 0.1)}, "ColorJitter"),
        ({"grayscale_prob": 0.1}, "RandomGrayscale"),
        ({"interpolation": "lanczos"}, "lanczos"),
        ({"normalize": False}, "MaybePILToTensor"),
    ],
    ids=str,
)
def test_settings_without_halves_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ViewTransform({**RECIPE, **change})


def test_a_large_jpeg_is_decoded_at_a_reduced_size(photographs):
    large = photographs[0].resize((1600, 1070))
    views = ViewTransform({**RECIPE, "scale": (0.5, 1.0)})
    for number in range(8):
        reduced, whole = Image.open(encode(large)), Image.open(encode(large))
        seed(number)
        found = views.decode(reduced)
        assert reduced.width <= 400
        whole.load()
        seed(number)
        wanted = views.decode(whole)
        assert (found.float() - wanted).abs().mean() < 2.5


@pytest.mark.parametrize(
    ("mode", "format"),
    [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("1", "PNG")],
)
@pytest.mark.parametrize("side", [100, 900])
def test_images_of_every_mode(photographs, mode, format, side):
    image = photographs[1].resize((side, side)).convert(mode)
    views = ViewTransform({**RECIPE, "scale": (0.9, 1.0)})
    seed(0)
    found = views.decode(Image.open(encode(image, format=format)))
    seed(0)
    wanted = views.decode(image.convert("RGB"))
    assert found.shape == (3, 96, 96)
    assert found.dtype == torch.uint8
    assert (found.float() - wanted).abs().mean() < 5


def test_an_image_of_one_pixel(photographs):
    """timm's crop of it has no pixel at times, which Pillow resizes to black."""
    pixel, views = photographs[0].resize((1, 1)), ViewTransform(RECIPE)
    colour = torch.tensor(pixel.getpixel((0, 0)))[:, None, None]
    for number in range(20):
        seed(number)
        assert (views.decode(pixel) == colour).all()


@pytest.fixture
def root(tmp_path, photographs):
    for name in "abc":
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        for index in range(4):
            image = photographs[index % 2].crop((index, index, 120 + index, 90))
            (folder / f"{index}.jpg").write_bytes(encode(image).read())
    return tmp_path


@pytest.fixture
def load_views(root, load_folder):
    """Makes a loader of the folder, whose images are to be augmented on the device."""

    def load(**options):
        transform = {**RECIPE, "input_size": 32}
        return load_folder(root, **{"transform": transform, "augment_on_device": True, **options})

    return load


def test_batches_of_an_epoch_are_the_same_after_a_resume(load_views):
    loader, preprocessor = load_views(), LabelledImages(num_classes=3)

    def epoch(number):
        seed(number)
        images, labels = zip(*map(preprocessor, loader), strict=True)
        assert torch.cat(labels).tolist() == [0] * 4 + [1] * 4 + [2] * 4
        return torch.cat(images)

    first, second = epoch(0), epoch(1)
    assert first.shape == (12, 3, 32, 32)
    assert first.dtype == torch.float32
    assert not torch.equal(first, second)
    assert torch.equal(epoch(1), second)


def test_the_preprocessor_leaves_its_batch_and_ignores_autocast(load_views):
    batch = next(iter(load_views(transform={**RECIPE, "re_prob": 0})))
    before = batch[0].pixels.clone()
    preprocessor = LabelledImages(num_classes=3)
    images, _ = preprocessor(batch)
    assert torch.equal(batch[0].pixels, before)
    with torch.autocast("cpu", torch.bfloat16):
        again, _ = preprocessor({"inputs": batch[0], "labels": batch[1]}).values()
    assert torch.equal(images, again)


def test_damaged_files_and_foreign_labels(root, load_views):
    damaged = root / "train" / "a" / "1.jpg"
    damaged.write_bytes(damaged.read_bytes()[:1500])
    (root / "train" / "b" / "2.jpg").write_bytes(b"no image")
    loader = load_views(corrupt_tolerance=0.2)
    labels = torch.cat([labels for _, labels in loader])
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert describe(loader.dataset) == "2 of 12 images could not be read: a/1.jpg, b/2.jpg"
    with pytest.raises(DataError, match=r"label of c/0\.jpg is 7, .* 3 classes"):
        load_views(class_map={"a": 0, "b": 1, "c": 7}).dataset[8]


def test_streamed_data_sets(photographs, monkeypatch):
    stream = timm.data.IterableImageDataset("", reader=list(zip(photographs, (0, 1), strict=True)))
    monkeypatch.setattr(timm.data, "create_dataset", lambda *args, **options: stream)
    dataset = DATASETS.build(
        {
            "type": "TimmDataset",
            "root": "",
            "name": "wds/images",
            "transform": RECIPE,
            "augment_on_device": True,
        }
    )
    images, labels = LabelledImages(num_classes=2)(default_collate(list(dataset)))
    assert images.shape == (2, 3, 96, 96)
    assert labels.tolist() == [0, 1]


VIEWS = {"view", "select", "slice", "unsqueeze", "expand", "permute", "unbind", "alias"}


class Launches(TorchDispatchMode):
    """Counts operators that compute; views launch nothing."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ not in VIEWS
        return function(*args, **(kwargs or {}))


def test_launches_do_not_grow_with_the_batch(photographs):
    transform = ViewTransform({**RECIPE, "input_size": 32})
    views = default_collate([transform(photographs[0]) for _ in range(512)])
    with Launches() as launches:
        augment(views, "cpu")
    assert launches.count < 300


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_cpus_images_and_is_not_waited_for(photographs):
    transform = ViewTransform({**RECIPE, "re_mode": "const", "interpolation": "random"})
    views = default_collate([transform(photographs[index % 2]) for index in range(64)])
    wanted = to_8_bits(augment(views, "cpu"), RECIPE)
    augment(views, "cuda")  # what is loaded at the first call may wait
    views = type(views)(*(tensor.pin_memory() for tensor in views))
    torch.cuda.set_sync_debug_mode("error")
    try:
        images = augment(views, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = (to_8_bits(images.cpu(), RECIPE) - wanted).abs()
    # Equalisation and solarisation make much of one level that is rounded otherwise.
    assert difference.mean() < 0.05
    assert (difference > 1.01).float().mean() < 2e-3
