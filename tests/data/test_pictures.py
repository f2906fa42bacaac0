"""Pictures of any depth and orientation are the same to every reader."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS
from PIL import Image

import linsight.data.classification
import linsight.data.segmentation  # noqa: F401
from linsight.data.pictures import prepare, read_picture
from linsight.data.sources import image_size
from linsight.tools.load import LoadedModel

RAMP = np.linspace(0, 65535, 40 * 48).reshape(40, 48).astype(np.uint16)
# The view of timm's transform is the whole picture, in its own size.
WHOLE = {"input_size": 48, "is_training": True, "scale": (1, 1), "ratio": (1, 1)}
WHOLE |= {"hflip": 0, "color_jitter": None}


def in_8_bits(image, statistics):
    """The picture, uint8 (H, W, 3), from a normalised image."""
    mean, std = (torch.tensor(statistics[key])[:, None, None] for key in ("mean", "std"))
    return ((image * std + mean) * 255).round().byte().permute(1, 2, 0).numpy()


def turned(pixels, orientation, file, **options):
    """Store pixels so that EXIF's orientation restores them."""
    turns = {1: 0, 6: 1, 3: 2, 8: 3}
    # The others mirror, and so undo themselves.
    mirrors = {2: np.fliplr, 4: np.flipud, 5: lambda p: p.swapaxes(0, 1)}
    mirrors[7] = lambda p: np.rot90(p.swapaxes(0, 1), 2)
    if orientation in turns:
        stored = np.rot90(pixels, turns[orientation])
    else:
        stored = np.ascontiguousarray(mirrors[orientation](pixels))
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(stored).save(file, exif=exif, **options)


class Sizes:
    def predict(self, picture):
        return picture.size


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (np.zeros((0, 5, 3), np.uint8), r"an array \(0, 5, 3\) without pixels"),
        (np.zeros((5, 0), np.uint8), r"an array \(5, 0\) without pixels"),
        (np.zeros((0,), np.uint8), r"is an array uint8 \(0,\), expected"),
        (Image.new("RGB", (0, 5)), "the picture has 0 x 5 pixels"),
        ([], "picture is a list of 0, expected one"),
        ((), "picture is a tuple of 0, expected one"),
        ("empty.png", "cannot identify image file"),
    ],
)
def test_pictures_without_pixels(tmp_path, monkeypatch, picture, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.png").touch()
    model = LoadedModel.__new__(LoadedModel)
    model.predictor = Sizes()
    with pytest.raises((ValueError, OSError), match=said):
        model.predict(picture)


@pytest.mark.parametrize(
    ("name", "mode"), [("a.png", "I;16"), ("a.tif", "I;16"), ("a.pgm", "I"), ("b.tif", "I;16B")]
)
def test_the_upper_8_of_16_bits(tmp_path, name, mode):
    pixels = RAMP.astype(">u2") if mode == "I;16B" else RAMP
    Image.fromarray(pixels).save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.mode == mode
    read = np.asarray(read_picture(tmp_path / name))
    assert np.array_equal(read, np.stack([RAMP >> 8] * 3, -1))
    opencv = cv2.imread(str(tmp_path / name))
    assert np.array_equal(read, opencv)


def test_other_depths(tmp_path):
    grey = (RAMP >> 8).astype(np.uint8)
    for values in (grey / np.float32(255), grey.astype(np.float32)):
        Image.fromarray(values.astype(np.float32)).save(tmp_path / "a.tif")
        assert np.array_equal(np.asarray(read_picture(tmp_path / "a.tif"))[..., 1], grey)
    for values in (RAMP.astype(np.float32), -grey.astype(np.float32), RAMP.astype(np.int32)):
        Image.fromarray(values).save(tmp_path / "a.tif")
        with pytest.raises(ValueError, match="save it in 8 or 16 bits"):
            read_picture(tmp_path / "a.tif")
    for mode in ("L", "LA", "RGBA", "P", "CMYK", "YCbCr"):
        file = tmp_path / f"a.{'tif' if mode in ('CMYK', 'YCbCr') else 'png'}"
        Image.fromarray(grey).convert("RGB").convert(mode).save(file)
        assert (
            np.abs(np.asarray(read_picture(file), int) - cv2.imread(str(file))[..., ::-1]).max()
            <= 1
        )
    palette = Image.fromarray(grey).convert("P")
    assert np.array_equal(prepare(palette.convert("PA")).convert("RGB"), palette.convert("RGB"))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright(tmp_path, suffix, orientation):
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, :32] = (250, 240, 230)
    turned(pixels, orientation, tmp_path / f"a.{suffix}")
    read = np.asarray(read_picture(tmp_path / f"a.{suffix}"), int)
    assert read.shape == pixels.shape
    assert np.abs(read - pixels)[2:-2, 2:-2].mean() < 3
    assert read[4, 4].min() > 200


def test_damaged_exif_leaves_the_pixels(tmp_path):
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert read_picture(tmp_path / "a.jpg").size == (8, 4)


@pytest.mark.parametrize("kind", ["16 bits", "turned"])
def test_every_data_set_reads_what_prediction_reads(tmp_path, kind):
    for folder in ("train/cat", "masks"):
        (tmp_path / folder).mkdir(parents=True)
    file = tmp_path / "train" / "cat" / "a.png"
    if kind == "turned":
        colours = np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8)
        turned(colours, 6, file)
    else:
        Image.fromarray(np.resize(RAMP, (48, 48))).save(file)
    wanted = np.asarray(read_picture(file))
    for options in (
        {},
        {"name": "torch/image_folder"},
        {"augment_on_device": True, "transform": {**WHOLE, "auto_augment": "rand-m0-n1"}},
    ):
        settings = {"type": "TimmDataset", "root": str(tmp_path), "transform": WHOLE, **options}
        dataset = DATASETS.build(settings)
        image, _ = dataset[0]
        if options.get("augment_on_device"):
            found = image.pixels.permute(1, 2, 0).numpy()
        else:
            found = in_8_bits(image, dataset.metainfo)
        assert np.abs(found.astype(int) - wanted).max() <= 1, options
    Image.new("L", (48, 48)).save(tmp_path / "masks" / "a.png")
    folder = {"type": "SegmentationFolder", "root": str(tmp_path), "images": "train/cat"}
    dataset = DATASETS.build({**folder, "masks": "masks", "classes": ["a"]})
    assert np.array_equal(in_8_bits(dataset[0][0], dataset.metainfo), wanted)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("stored", [False, True], ids=["upright", "stored"])
def test_which_way_masks_and_boxes_are(tmp_path, stored, orientation, suffix):
    """Annotations are of the picture upright, or as it lies in the file. Where EXIF swaps its
    sides their size says which, and `upright` elsewhere."""
    from linsight.data.coco import LoadPicture

    pixels = np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    file = tmp_path / "images" / f"a.{suffix}"
    turned(pixels, orientation, file)
    assert image_size(file) == (64, 32)
    turned(pixels, orientation, tmp_path / "as_it_lies.png")
    wanted = pixels
    if stored:
        with Image.open(tmp_path / "as_it_lies.png") as lying:
            wanted = np.asarray(lying)
    height, width, _ = wanted.shape
    swapped = (height, width) != (32, 64)
    upright = {} if swapped else {"upright": not stored}
    Image.new("L", (width, height)).save(tmp_path / "masks" / "a.png")
    folder = {"type": "SegmentationFolder", "root": str(tmp_path), "images": "images"}
    dataset = DATASETS.build({**folder, "masks": "masks", "classes": ["a"], **upright})
    assert np.array_equal(in_8_bits(dataset[0][0], dataset.metainfo), wanted)
    step = SimpleNamespace(backend_args=None, ignore_empty=False, to_float32=False)
    load = LoadPicture(step, **upright)
    entry = {"img_path": str(file), "width": width, "height": height}
    assert np.array_equal(load(dict(entry))["img"][..., ::-1], wanted)
    with pytest.raises(ValueError, match=r"the picture has .* pixels, and its entry .* 9 x"):
        load({**entry, "width": 9})
