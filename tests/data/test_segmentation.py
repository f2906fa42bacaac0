"""Data sets of images and masks, and faults in them."""

import logging
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS
from PIL import Image
from torchvision import tv_tensors

from linsight.data.digits import digit_scene
from linsight.data.loading import DataCheckHook, DataError
from linsight.data.mask_transforms import (
    PhotometricDistortion,
    RandomClassCrop,
    build_transforms,
)
from linsight.data.masks import IGNORE
from linsight.data.segmentation import named_colours
from linsight.heads.segmentation_figures import class_colours

FLIP = {"type": "torchvision.transforms.v2.RandomHorizontalFlip", "p": 1.0}


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def folder(tmp_path):
    """Three images of 20 x 30, and masks of four classes: 0 to 3 in columns."""
    rng = np.random.default_rng(0)
    columns = np.tile(np.arange(30, dtype=np.uint8) // 8, (20, 1))
    for name in ("a", "b", "part/c"):
        image = rng.integers(256, size=(20, 30, 3), dtype=np.uint8)
        image[..., 0] = 60 * columns
        write(tmp_path / "images" / f"{name}.png", image)
        write(tmp_path / "masks" / f"{name}.png", columns)
    return tmp_path


def build(root, **options):
    settings = {"images": "images", "masks": "masks", "classes": "pqrs", **options}
    return DATASETS.build({"type": "SegmentationFolder", "root": str(root), **settings})


def red(image):
    """The classes that the images encode in red, read from the normalised image."""
    return ((image[0] * 0.229 + 0.485) * 255 / 60).round().long()


class TestFolder:
    def test_image_and_labels_stay_together(self, folder):
        crop = {"type": "RandomClassCrop", "size": (16, 20)}
        dataset = build(folder, transforms=[crop, FLIP])
        assert len(dataset) == 3
        assert dataset.metainfo["classes"] == ["p", "q", "r", "s"]
        image, labels = dataset[2]
        assert image.shape == (3, 16, 20)
        assert (image.dtype, labels.dtype) == (torch.float32, torch.uint8)
        assert type(image) is type(labels) is torch.Tensor
        assert red(image).equal(labels.long())

    def test_labels_of_a_test_keep_their_size(self, folder):
        resize = {"type": "torchvision.transforms.v2.Resize", "size": 40}
        image, labels = build(folder, transforms=[resize], test_mode=True)[0]
        assert image.shape == (3, 40, 60)
        assert labels.shape == (20, 30)

    def test_labels_that_count_from_one(self, folder):
        mask = np.array(Image.open(folder / "masks/a.png"))
        mask[0, :2] = (0, 255)
        write(folder / "masks/a.png", mask)
        labels = build(folder, reduce_zero_label=True, classes="pqr")[0][1]
        assert labels[0, :2].tolist() == [IGNORE, IGNORE]
        assert labels[1, [0, 8, 24]].tolist() == [IGNORE, 0, 2]

    def test_numbers_of_another_count(self, folder):
        labels = build(folder, label_map={0: 1, 3: 0}, classes="pq")[0][1]
        assert labels[0, [0, 8, 16, 24]].tolist() == [1, IGNORE, IGNORE, 0]

    def test_a_nested_transform(self, folder):
        nested = {
            "type": "torchvision.transforms.v2.RandomApply",
            "transforms": [FLIP],
            "p": 1.0,
        }
        image, labels = build(folder, transforms=[nested])[0]
        assert labels[0, 0] == 3
        assert red(image).equal(labels.long())


@pytest.mark.parametrize("kind", ["1 bit", "float", "32 bits", "reduced"])
def test_masks_of_other_numbers(folder, kind):
    """Of one bit, of floating point, beyond 16 bits: whole numbers are what they are."""
    numbers = np.zeros((20, 30), {"1 bit": bool, "float": np.float32}.get(kind, np.int32))
    numbers[:, 10:] = 1
    if kind == "32 bits":
        numbers[:, 20:] = 70_000
    for file in list((folder / "masks").rglob("*.png")):
        file.unlink()
        Image.fromarray(numbers).save(file.with_suffix(".png" if kind == "1 bit" else ".tif"))
    suffix = ".png" if kind == "1 bit" else ".tif"
    if kind == "reduced":
        found = build(folder, classes="pq", mask_suffix=suffix, reduce_zero_label=True)[0][1]
        assert found.unique().tolist() == [0, 255]
        return
    found = build(folder, classes="pq", mask_suffix=suffix, label_map={0: 1, 1: 0})[0][1]
    assert found[:, :10].unique().tolist() == [1]
    assert found[:, 10:20].unique().tolist() == [0]
    assert found[:, 20:].unique().tolist() == [255 if kind == "32 bits" else 0]
    with pytest.raises(ValueError, match="label_map has 70000, expected numbers from 0 to 65535"):
        build(folder, classes="pq", mask_suffix=suffix, label_map={70_000: 1})


class TestFaults:
    def test_a_label_that_no_class_has(self, folder):
        with pytest.raises(DataError, match=r"mask of part/c\.png has the labels 3, .* 3 classes"):
            build(folder, classes="pqr")[2]

    def test_a_mask_of_another_size(self, folder):
        write(folder / "masks/b.png", np.zeros((20, 31), np.uint8))
        with pytest.raises(DataError, match=r"mask of b\.png has the shape \(20, 31\).*\(20, 30\)"):
            build(folder)[1]

    def test_a_mask_in_colour(self, folder):
        write(folder / "masks/b.png", np.zeros((20, 30, 3), np.uint8))
        with pytest.raises(DataError, match=r"mask of b\.png.*one number for each pixel"):
            build(folder)[1]

    def test_a_missing_mask(self, folder):
        (folder / "masks/part/c.png").unlink()
        with pytest.raises(DataError, match=r"1 of 3 images .* have no mask: .*part/c\.png"):
            build(folder)

    def test_missing_and_empty_folders(self, folder):
        with pytest.raises(DataError, match="elsewhere' does not exist: set data_root"):
            build(folder, images="elsewhere")
        (folder / "empty").mkdir()
        with pytest.raises(DataError, match="empty' holds no images"):
            build(folder, images="empty")
        with pytest.raises(DataError, match=r"objectInfo150\.txt does not exist"):
            DATASETS.build({"type": "ADE20K", "root": str(folder)})

    def test_an_unknown_transform(self, folder):
        with pytest.raises(DataError, match=r"no 'torchvision\.transforms\.v2\.Flip'"):
            build(folder, transforms=[{"type": "torchvision.transforms.v2.Flip"}])

    def test_an_unreadable_file_is_stepped_over_and_counted(self, folder, caplog):
        (folder / "masks/a.png").write_bytes(b"no picture")
        dataset = build(folder)
        assert dataset[0][0].equal(dataset[1][0])
        assert dataset.corrupt.tolist() == [True, False, False]
        self.report(dataset, caplog)
        assert "1 of 3 images could not be read: a.png; others took" in caplog.text
        (folder / "images/b.png").write_bytes(b"")
        with pytest.raises(DataError, match="2 of 3 images could not be read"):
            dataset[1]

    def test_an_image_without_labels_is_counted(self, folder, caplog):
        write(folder / "masks/b.png", np.full((20, 30), IGNORE, np.uint8))
        dataset = build(folder, transforms=[{"type": "RandomClassCrop", "size": 16}])
        assert (dataset[1][1] == IGNORE).all()
        assert dataset.unlabelled.tolist() == [False, True, False]
        self.report(dataset, caplog)
        assert "1 of 3 images have no labelled pixel: b.png" in caplog.text

    @staticmethod
    def report(dataset, caplog, hook=None):
        class Runner:
            logger = logging.getLogger("test")

        with caplog.at_level("WARNING"):
            (hook or DataCheckHook())._report(Runner, dataset, "training")


class TestNumbersThatAreNoClasses:
    @staticmethod
    def write(folder, *values):
        """Masks of these values in columns, the same in each file."""
        mask = np.resize(np.repeat(np.array(values, np.uint8), 4), (20, 30))
        for name in ("a", "b", "part/c"):
            write(folder / "masks" / f"{name}.png", mask)

    def test_two_classes_of_which_one_would_be_ignored(self, folder):
        self.write(folder, 0, 255)
        with pytest.raises(DataError, match=r"no pixel of 1 of the 2 .*label_map=\{0: 0, 255: 1\}"):
            build(folder, classes="pq")
        labels = build(folder, classes="pq", label_map={0: 0, 255: 1})[0][1]
        assert labels.unique().tolist() == [0, 1]
        assert build(folder, classes="pq", label_map={0: 0, 1: 1})[0][1].unique().tolist() == [
            0,
            255,
        ]
        with pytest.raises(DataError, match="alone, which reduce_zero_label ignores"):
            build(folder, classes="pq", reduce_zero_label=True)
        self.write(folder, 1, 255)
        with pytest.raises(DataError, match=r"label_map=\{1: 0, 255: 1\}"):
            build(folder, classes="pqr")

    @pytest.mark.parametrize(
        ("values", "classes", "fix"),
        [
            ((0, 128, 255), "pqr", "{0: 0, 128: 1, 255: 2}"),
            ((0, 38, 75), "pqrs", "{0: 0, 38: 1, 75: 2}"),
        ],
    )
    def test_shades_of_grey(self, folder, values, classes, fix):
        self.write(folder, *values)
        with pytest.raises(DataError, match=rf"set label_map={fix} if these numbers stand for"):
            build(folder, classes=classes)[0]

    @pytest.mark.parametrize(
        ("values", "options", "fix"),
        [
            ((0, 255), {"classes": "p"}, r"\{0: 0, 255: 1\}, and name 2 classes, if .*\{0: 0\}"),
            ((0, 127, 255), {"classes": range(150)}, r"\{0: 0, 127: 1, 255: 2\} if"),
            ((0, 85, 170, 255), {"classes": range(200), "reduce_zero_label": True}, r"\{0: 0, 85"),
            ((128, 255), {"classes": "pq", "label_map": {0: 0, 1: 1}}, "which label_map lacks"),
        ],
    )
    def test_shades_of_grey_whatever_the_classes(self, folder, values, options, fix):
        self.write(folder, *values)
        with pytest.raises(DataError, match=fix):
            build(folder, **options)

    @pytest.mark.parametrize(
        ("values", "options", "said"),
        [
            ((0, 128, 255), {"classes": "pq", "label_map": {0: 0, 128: 1}}, "255 is ignored (33"),
            ((0, 1, 255), {"classes": "p", "reduce_zero_label": True}, "0, 255 are ignored (66.7"),
        ],
    )
    def test_what_is_ignored_on_purpose_is_said(
        self, folder, capfd, monkeypatch, values, options, said
    ):
        monkeypatch.setattr(MMLogger, "_instance_dict", OrderedDict())
        self.write(folder, *values)
        build(folder, **options)
        output = capfd.readouterr()
        assert said in output.out + output.err

    def test_absent_classes_are_said_once(self, folder, caplog, capfd, monkeypatch):
        monkeypatch.setattr(MMLogger, "_instance_dict", OrderedDict())
        self.write(folder, 0, 1, 255)
        dataset = build(folder, classes="pqr")
        said = capfd.readouterr()
        assert "no pixel of 1 of the 3 classes (r). If 255 is a class" in said.out + said.err
        self.write(folder, 0, 1)
        dataset = build(folder, classes="pqr")
        _ = [dataset[i] for i in range(3)]
        hook = DataCheckHook()
        for _ in range(2):
            TestFaults.report(dataset, caplog, hook)
        assert caplog.text.count("no mask has shown a pixel of 1 classes: r") == 1


MOVES = [
    {"type": "torchvision.transforms.v2.RandomRotation", "degrees": (45, 45)},
    {"type": "torchvision.transforms.v2.RandomRotation", "degrees": (45, 45), "fill": 9},
    {"type": "torchvision.transforms.v2.RandomAffine", "degrees": 0, "translate": (0.9, 0.9)},
    {"type": "torchvision.transforms.v2.RandomPerspective", "distortion_scale": 0.9, "p": 1.0},
    {
        "type": "torchvision.transforms.v2.ElasticTransform",
        "alpha": 900.0,
        "sigma": 1.0,
        "interpolation": 0,
    },
    {"type": "torchvision.transforms.v2.Pad", "padding": 5, "fill": (1, 2, 3)},
    {"type": "torchvision.transforms.v2.RandomZoomOut", "p": 1.0, "side_range": (2.0, 3.0)},
    {"type": "torchvision.transforms.v2.RandomCrop", "size": 40, "pad_if_needed": True},
    {"type": "torchvision.transforms.v2.CenterCrop", "size": 40},
    {"type": "RandomClassCrop", "size": 40},
]


def test_one_label_to_ignore_for_data_and_model(folder):
    dataset = build(folder, ignore_index=0)
    assert dataset.metainfo["ignore_index"] == 0
    loader = SimpleNamespace(dataset=dataset)
    runner = SimpleNamespace(model=torch.nn.Identity(), test_dataloader=loader)
    runner.model.ignore_index = 0
    DataCheckHook().before_test(runner)
    runner.model.ignore_index = 255
    with pytest.raises(
        DataError, match=r"model\.ignore_index is 255, .* dataset\.ignore_index=255"
    ):
        DataCheckHook().before_test(runner)
    with pytest.raises(DataError, match=r"ignore_index is -100, expected 0 to 255"):
        build(folder, ignore_index=-100)


class TestOutside:
    @pytest.mark.parametrize("ignore_index", [IGNORE, 7])
    @pytest.mark.parametrize("move", MOVES, ids=lambda move: move["type"].rpartition(".")[2])
    def test_what_a_transform_adds_is_of_no_class(self, folder, move, ignore_index):
        """In the images of the folder red is 200 everywhere, and outside it is not."""
        for name in ("a", "b", "part/c"):
            write(folder / f"images/{name}.png", np.full((20, 30, 3), 200, np.uint8))
            write(folder / f"masks/{name}.png", np.full((20, 30), 2, np.uint8))
        nested = {"type": "torchvision.transforms.v2.RandomApply", "p": 1.0, "transforms": [move]}
        torch.manual_seed(0)
        image, labels = build(folder, transforms=[nested], ignore_index=ignore_index)[0]
        level = (image[0] * 0.229 + 0.485) * 255
        assert sorted(labels.unique().tolist()) == sorted([2, ignore_index])
        inside = labels == 2
        assert (level[~inside] < 199).float().mean() > 0.9
        assert (level[inside] > 199).float().mean() > 0.9


V2 = "torchvision.transforms.v2."


class TestAutomaticAugmentation:
    @pytest.mark.parametrize("kind", ["RandAugment", "AutoAugment", "TrivialAugmentWide"])
    def test_masks_move_with_their_images(self, kind):
        corner = torch.zeros(40, 40, dtype=torch.uint8)
        corner[:20, :20] = 1
        image = tv_tensors.Image(torch.stack([100 * corner + 50] * 3))
        transforms = build_transforms([{"type": f"{V2}{kind}"}], ignore_index=7)
        torch.manual_seed(0)
        moved = 0
        for _ in range(60):
            picture, mask = transforms(image, tv_tensors.Mask(corner))
            assert set(mask.unique().tolist()) <= {0, 1, 7}
            moved += not mask.equal(corner)
            levels = picture[0].float()
            for label in (0, 1):
                inside = levels[mask == label]
                # Two small moves after one another, and sharpening, mix pixels at the edges.
                same = (inside - inside.median()).abs() <= 3
                assert not inside.numel() or same.float().mean() > 0.85
        assert moved > 5
        assert transforms(image).shape == image.shape

    @pytest.mark.parametrize(
        ("name", "fix"),
        [
            (f"{V2}AugMix", "leave it out"),
            (f"{V2}FiveCrop", "leave it out"),
            ("torchvision.transforms.RandAugment", rf"take {V2}RandAugment"),
            ("torchvision.transforms.RandomRotation", rf"take {V2}RandomRotation"),
        ],
    )
    def test_transforms_of_images_alone_are_named(self, name, fix):
        with pytest.raises(DataError, match=rf"{name} takes no masks: {fix}\. Of torchvision"):
            build_transforms([{"type": name, "degrees": 1}])

    def test_erasing_leaves_the_mask(self, folder):
        erase = {"type": f"{V2}RandomErasing", "p": 1.0, "value": 9}
        image, labels = build(folder, transforms=[erase])[0]
        assert labels.equal(build(folder)[0][1])
        assert not image.equal(build(folder)[0][0])


class TestRandomClassCrop:
    def test_a_crop_has_more_than_one_class(self):
        mask = torch.zeros(64, 64, dtype=torch.uint8)
        mask[:, 40:] = 1
        image = tv_tensors.Image(torch.stack([mask] * 3))
        torch.manual_seed(0)
        shares = []
        for tries in (1, 50):
            crop = RandomClassCrop(16, cat_max_ratio=0.75, tries=tries)
            kept = [crop(image, tv_tensors.Mask(mask)) for _ in range(40)]
            assert all(torch.equal(x[0], y) for x, y in kept)
            shares.append(max(y.float().mean().clamp(min=(1 - y.float()).mean()) for _, y in kept))
        assert shares[0] == 1
        assert shares[1] < 0.75

    def test_what_is_too_small_is_padded(self):
        image = tv_tensors.Image(torch.zeros(3, 10, 40, dtype=torch.uint8))
        mask = tv_tensors.Mask(torch.zeros(10, 40, dtype=torch.uint8))
        image, mask = RandomClassCrop(16)(image, mask)
        assert image.shape == (3, 16, 16)
        assert (mask == IGNORE).sum() == 6 * 16
        assert image[:, mask == IGNORE].unique(dim=1).flatten().tolist() == [123, 116, 103]


class TestPhotometricDistortion:
    def draw(self, image, draws=300):
        distortion = PhotometricDistortion()
        return torch.stack([distortion(image).float() for _ in range(draws)])

    def test_statistics_are_mmsegmentations(self):
        """The deviation of the mean level follows from brightness +-32 and contrast 0.5 to 1.5."""
        level = 110.0
        image = tv_tensors.Image(torch.full((3, 8, 8), int(level), dtype=torch.uint8))
        means = self.draw(image, 2000).mean((1, 2, 3))
        offset, factor = 32**2 / 3 / 2, level**2 / 12 / 2
        assert means.std().item() == pytest.approx((offset + factor) ** 0.5, rel=0.08)
        assert means.mean().item() == pytest.approx(level, rel=0.02)

    def test_colours_change_and_masks_do_not(self):
        ramp = torch.arange(3 * 64, dtype=torch.uint8).view(3, 8, 8)
        images = self.draw(tv_tensors.Image(ramp))
        assert images.amin() >= 0
        assert images.amax() <= 255
        # A quarter of the images keeps saturation and hue, and one in sixteen everything.
        same = (images == ramp).all(3).all(2).all(1).float().mean().item()
        assert same == pytest.approx(1 / 16, abs=0.05)
        mask = tv_tensors.Mask(torch.arange(64, dtype=torch.uint8).view(8, 8))
        _, kept = PhotometricDistortion()(tv_tensors.Image(ramp), mask)
        assert torch.equal(kept, mask)


def test_ade20k(tmp_path):
    names = "Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "".join(
        f"{i}\t0.1\t1\t1\t1\tthing {i}, other name\n" for i in range(1, 151)
    )
    (tmp_path / "objectInfo150.txt").write_text(names)
    write(tmp_path / "images/validation/x.jpg", np.zeros((9, 9, 3), np.uint8))
    mask = np.arange(81, dtype=np.uint8).reshape(9, 9) + 70
    mask[0, 0] = 0
    write(tmp_path / "annotations/validation/x.png", mask)
    dataset = DATASETS.build({"type": "ADE20K", "root": str(tmp_path), "split": "validation"})
    assert dataset.metainfo["classes"][149] == "thing 150"
    labels = dataset[0][1]
    assert labels[0, 0] == IGNORE
    assert labels[8, 8] == 149


def test_cityscapes(tmp_path):
    write(tmp_path / "leftImg8bit/val/ulm/ulm_0_leftImg8bit.png", np.zeros((4, 4, 3), np.uint8))
    ids = np.array([[7, 33, 0, 1]] * 4, np.uint8)
    write(tmp_path / "gtFine/val/ulm/ulm_0_gtFine_labelIds.png", ids)
    dataset = DATASETS.build({"type": "Cityscapes", "root": str(tmp_path), "split": "val"})
    assert dataset.metainfo["classes"][0] == "road"
    assert len(dataset.metainfo["classes"]) == 19
    assert dataset[0][1][0].tolist() == [0, 18, IGNORE, IGNORE]


def test_digits():
    scenes = {"split": "test", "length": 3, "size": 64, "digits": 2, "digit_size": (0.4, 0.6)}
    dataset = DATASETS.build({"type": "DigitSegmentation", **scenes})
    scene = digit_scene(
        2, "test", size=64, digits=2, digit_size=(0.4, 0.6), max_overlap=0.1, clutter=8
    )
    np.testing.assert_array_equal(dataset[2][1].numpy(), scene.semantic)
    assert len(dataset) == 3


def test_usual_colours_of_the_benchmarks():
    names, colours = named_colours("ADE20K")
    assert len(names) == len(colours) == 150
    assert dict(zip(names, colours, strict=True))["sky"] == (6, 230, 230)
    assert (names[0], names[7], names[-1]) == ("wall", "bed", "flag")
    names, colours = named_colours("Cityscapes")
    assert len(names) == len(colours) == 19
    assert dict(zip(names, colours, strict=True))["road"] == (128, 64, 128)
    assert named_colours("SegmentationFolder") is None
    assert class_colours(names, colours)[0] == (128, 64, 128)
