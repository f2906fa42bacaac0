"""Classification data through mmengine: timm's readers, bad folders, corrupt images."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import DATA_SAMPLERS, DATASETS
from mmengine.runner import Runner
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions

import linsight.data.classification  # registers TimmDataset
import linsight.data.segmentation  # noqa: F401  registers SegmentationFolder
from linsight.data.loading import DataError, describe
from linsight.data.source_formats import read
from linsight.data.sources import ENDINGS, images_in, read_source
from linsight.data.unlabelled import PictureFolder
from linsight.tools.predict import find_pictures


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for split, classes in (("train", "abc"), ("val", "abc")):
        for name in classes:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(4):
                picture = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(picture).save(folder / f"{index}.png")
    return tmp_path


def build(root, **kwargs):
    return DATASETS.build({"type": "TimmDataset", "root": str(root), **kwargs})


def test_image_folder(root):
    dataset = build(root, split="train", transform={"input_size": 32, "is_training": True})
    assert len(dataset) == 12
    assert dataset.metainfo["classes"] == ["a", "b", "c"]
    image, label = dataset[5]
    assert image.shape == (3, 32, 32)
    assert label == 1


def test_evaluation_resizes_and_crops_and_normalises_once(root):
    dataset = build(root, split="validation", transform={"input_size": 32, "crop_pct": 0.875})
    image, _ = dataset[0]
    with Image.open(root / "val" / "a" / "0.png") as source:
        short = source.resize((round(36 * 48 / 40), 36), Image.BILINEAR)
    left, top = round((short.width - 32) / 2), (36 - 32) // 2
    crop = np.asarray(short.crop((left, top, left + 32, top + 32)), np.float32) / 255
    mean, std = (torch.tensor(dataset.metainfo[k])[:, None, None] for k in ("mean", "std"))
    wanted = (torch.from_numpy(crop).permute(2, 0, 1) - mean) / std
    assert (image - wanted).abs().median() < 0.05


def test_timms_other_readers(root, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "train_tar"), "tar", root / "train")
    tar = DATASETS.build({"type": "TimmDataset", "root": archive, "transform": {"input_size": 32}})
    assert len(tar) == 12
    assert tar[11][1] == 2
    torchvision = build(root, name="torch/image_folder", transform={"input_size": 32})
    assert len(torchvision) == 12
    assert torchvision.metainfo["classes"] == ["a", "b", "c"]


def hide(folder):
    """Put into a folder what operating systems and storage devices leave there."""
    for name in ("__MACOSX/a", ".ipynb_checkpoints", "@eaDir/a", "a/@eaDir", "a"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file in ("._0.png", "Thumbs.db"):
            (folder / name / file).write_bytes(b"nothing")
    for name in (".ipynb_checkpoints/0-checkpoint.png", "@eaDir/0.png", "a/@eaDir/0.png"):
        Image.new("RGB", (8, 8)).save(folder / name)


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar file"])
def test_pictures_of_every_format_are_found(tmp_path, packed):
    """timm's readers know PNG and JPEG alone, and say nothing of others."""
    formats = ("png", "JPG", "webp", "bmp", "tif", "gif", "ppm")
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        for ending in formats:
            Image.new("RGB", (40, 40)).save(tmp_path / "data" / name / f"x.{ending}")
    source = tmp_path / "data"
    if packed:
        source = shutil.make_archive(str(tmp_path / "made"), "tar", source)
    known = get_img_extensions()
    dataset = build(source, transform={"input_size": 8})
    assert [dataset[i][1] for i in range(len(dataset))] == [0] * 7 + [1] * 7
    assert not dataset.corrupt.any()
    assert get_img_extensions() == known


@pytest.mark.parametrize("kind", ["folders", "torchvision", "tar", "class_map"])
def test_hidden_files_and_folders_are_no_classes(root, tmp_path, kind):
    hide(root / "train")
    options = {
        "folders": {},
        "torchvision": {"name": "torch/image_folder"},
        "tar": {},
        "class_map": {"class_map": {"a": 0, "b": 1, "c": 2, "@eaDir": 3}},
    }[kind]
    if kind == "tar":
        root = shutil.make_archive(str(tmp_path / "made"), "tar", root / "train")
    dataset = build(root, transform={"input_size": 8}, **options)
    assert [dataset[i][1] for i in range(len(dataset))] == [0] * 4 + [1] * 4 + [2] * 4
    assert not dataset.corrupt.any()
    if kind in ("folders", "torchvision"):
        assert dataset.metainfo["classes"] == ["a", "b", "c"]


def test_a_folder_is_predicted_with_the_formats_that_are_trained(tmp_path):
    for ending in ENDINGS:
        (tmp_path / f"x{ending.upper()}").touch()
    (tmp_path / "x.txt").touch()
    assert {file.suffix.lower() for file in find_pictures([tmp_path])} == set(ENDINGS)


def test_a_second_checkpoint_is_no_picture(tmp_path):
    checkpoint = tmp_path / "best_epoch_2.pth"
    checkpoint.touch()
    with pytest.raises(DataError, match=r"best_epoch_2\.pth is a checkpoint"):
        find_pictures([checkpoint])


def test_hidden_pictures_are_not_read(root):
    hide(root / "train")
    wanted = sorted((root / "train").glob("[abc]/[0-9].png"))
    assert find_pictures([root / "train"]) == wanted
    assert images_in(root / "train") == wanted
    assert read(str(root)).classes == ["a", "b", "c"]
    pictures = PictureFolder(str(root))
    assert [pictures.name_of(i) for i in range(len(pictures))] == list(map(str, wanted))
    masks = root / "masks"
    shutil.copytree(root / "train", masks)
    pairs = DATASETS.build(
        {
            "type": "SegmentationFolder",
            "root": str(root),
            "images": "train",
            "masks": "masks",
            "classes": range(200),
        }
    )
    assert len(pairs) == 12


class TestNestedFolders:
    """A class's images in folders within its folder, as of cats and dogs on farms and in town."""

    @pytest.fixture
    def nested(self, tmp_path):
        for folder in ("cat/farm", "cat", "dog/farm", "dog/town/day"):
            for split in ("train", "val"):
                path = tmp_path / split / folder
                path.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8)).save(path / "0.png")
        return tmp_path

    def test_the_outermost_folder_is_the_class(self, nested, tmp_path):
        archive = shutil.make_archive(str(tmp_path / "train_tar"), "tar", nested, "train")
        with pytest.raises(DataError, match=r"at several depths, .* unpack it"):
            build(archive)
        for split in ("train", "validation"):
            dataset = build(nested, split=split)
            assert dataset.metainfo["classes"] == ["cat", "dog"]
            assert sorted(dataset[i][1] for i in range(4)) == [0, 0, 1, 1]

    def test_a_class_map_names_any_folder(self, nested):
        for names, labels in (("dog", "cat"), [0, 0, 1, 1]), (("town", "farm"), [0, 1, 1]):
            class_map = {name: label for label, name in enumerate(names)}
            dataset = build(nested, class_map=class_map)
            assert dataset.metainfo["classes"] == list(names)
            assert sorted(dataset[i][1] for i in range(len(dataset))) == labels

    def test_images_of_no_class(self, nested):
        Image.new("RGB", (8, 8)).save(nested / "train" / "stray.png")
        with pytest.raises(DataError, match=r"1 of 5 images .* no class's folder: .*stray\.png"):
            build(nested)

    def test_a_folder_of_folders(self, nested):
        (nested / "train").rename(nested / "pets")
        shutil.rmtree(nested / "val")
        shutil.rmtree(nested / "pets" / "cat")
        with pytest.raises(DataError, match=r"the one folder 'pets' .* set the root to '.*/pets'"):
            build(nested)


def test_a_hugging_face_data_set_without_a_validation_split(root, tmp_path_factory):
    """A share of each class is drawn, the same one by the same seed."""
    pytest.importorskip("datasets")
    shutil.rmtree(root / "val")
    cache = str(tmp_path_factory.mktemp("cache"))
    source = read_source(f"hfds/{root}", seed=3, share=0.5)
    assert source.classes == ["a", "b", "c"]
    assert "50% of each class are drawn for it, with the seed 3" in source.notes[0]
    parts = {
        name: DATASETS.build({"type": "TimmDataset", "root": cache, **arguments})
        for name, arguments in source.reader.items()
    }
    for part in parts.values():
        assert sorted(label for _, label in part) == [0, 0, 1, 1, 2, 2]
    names = [{part.name_of(i) for i in range(6)} for part in parts.values()]
    assert not names[0] & names[1]


# One of linsight's configs gives this to mmengine; the working directory is a checkout.
BATCHES = """
import sys
from mmengine.runner import Runner
from linsight.tools.config import load_config

name, cache, *options = sys.argv[1:]
loaders = ("train_dataloader", "val_dataloader", "test_dataloader")
cfg = load_config(
    "rala_vit_tiny_300e_in1k",
    [f"data_root={cache}", "train_dataloader.sampler.selected_round=4", *options]
    + [f"{loader}.dataset.name=hfds/{name}" for loader in loaders]
    + [f"{loader}.{key}" for loader in loaders for key in ("batch_size=4", "num_workers=1")],
)
for loader in loaders[:2]:
    loader = Runner.build_dataloader(cfg[loader], seed=0)
    data = loader.dataset
    labels = [int(label) for images, batch in loader for label in batch]
    images, _ = next(iter(loader))
    shape = tuple(getattr(images, "pixels", images).shape)
    print(len(data), data.metainfo["classes"], sorted(labels), shape, data.name_of(5))
"""


@pytest.mark.parametrize("kind", ["files", pytest.param("bytes", marks=pytest.mark.slow)])
def test_hugging_faces_data_sets_from_the_repositorys_root(root, tmp_path_factory, kind):
    """There `import datasets` must be Hugging Face's package, which no folder may hide."""
    hub = pytest.importorskip("datasets")
    beside = tmp_path_factory.mktemp("hub")
    source = root
    if kind == "bytes":
        source = beside / "parquet"
        for split in ("train", "val"):
            files = sorted((root / split).rglob("*.png"))
            rows = {
                "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
                "label": ["abc".index(file.parent.name) for file in files],
            }
            features = hub.Features(image=hub.Image(), label=hub.ClassLabel(names=["a", "b", "c"]))
            table = hub.Dataset.from_dict(rows, features=features)
            table.to_parquet(source / f"{split}-00000-of-00001.parquet")
    done = subprocess.run(
        [sys.executable, "-c", BATCHES, str(source), str(beside / "cache")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(beside / "home")},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    train, validation = done.stdout.splitlines()[-2:]
    assert train.startswith("12 ['a', 'b', 'c'] [")
    assert train.endswith("1.png" if kind == "files" else "(4, 3, 224, 224) 5")
    labels = [0] * 4 + [1] * 4 + [2] * 4
    assert validation.startswith(f"12 ['a', 'b', 'c'] {labels} (4, 3, 224, 224)")


def test_corrupt_images_are_replaced_and_counted_across_workers(root, load_folder):
    (root / "train" / "a" / "1.png").write_bytes(b"no image")
    whole = (root / "train" / "b" / "2.png").read_bytes()
    (root / "train" / "b" / "2.png").write_bytes(whole[: len(whole) // 2])
    loader = load_folder(root, transform={"input_size": 32}, corrupt_tolerance=0.2)
    images, labels = zip(*loader, strict=True)
    assert torch.cat(labels).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    images = torch.cat(images)
    assert torch.equal(images[1], images[2])
    assert describe(loader.dataset) == ("2 of 12 images could not be read: a/1.png, b/2.png")


def test_too_many_corrupt_images_are_an_error(root):
    for index in range(2):
        (root / "train" / "a" / f"{index}.png").write_bytes(b"no image")
    dataset = build(root, transform={"input_size": 32}, corrupt_tolerance=0.1)
    with pytest.raises(DataError, match=r"2 of 12 .*a/0.png, a/1.png.*corrupt_tolerance"):
        dataset[0]


def test_empty_class_folders_are_named(root):
    for name in "de":
        (root / "train" / name).mkdir()
    with pytest.raises(DataError, match=r"2 class folders .* d, e.*class_map"):
        build(root)
    assert len(build(root, class_map={"a": 0, "b": 1, "c": 2, "d": 3})) == 12


@pytest.mark.parametrize("label", [-1, 3, 7])
def test_a_label_of_no_class(root, label):
    dataset = build(root, class_map={"a": 0, "b": 1, "c": label}, transform={"input_size": 32})
    assert dataset[0][1] == 0
    with pytest.raises(DataError, match=rf"label of c/0\.png is {label}, .* 3 classes.* class_map"):
        dataset[8]


def test_missing_folders_are_clear(root):
    with pytest.raises(DataError, match="nowhere' does not exist"):
        build(root / "nowhere")
    shutil.rmtree(root / "val")
    with pytest.raises(DataError, match="none for split 'validation'"):
        build(root, split="validation")
    shutil.rmtree(root / "train")
    with pytest.raises(DataError, match="0 images"):
        build(root)


def test_digits_under_timms_transform():
    dataset = DATASETS.build(
        {
            "type": "DigitClassification",
            "split": "test",
            "length": 3,
            "size": 48,
            "transform": {"input_size": 48, "crop_pct": 1.0},
        }
    )
    assert len(dataset) == 3
    assert dataset[0][0].shape == (3, 48, 48)
    assert dataset.metainfo["classes"] == list("0123456789")


class TestRepeatAugSampler:
    def build(self, length=512, **kwargs):
        return DATA_SAMPLERS.build({"type": "RepeatAugSampler", "dataset": range(length), **kwargs})

    def test_three_views_of_a_third_of_the_images(self):
        indices = list(self.build(seed=0))
        assert len(indices) == 512
        counts = np.unique(indices, return_counts=True)[1]
        assert (counts[:-1] == 3).sum() >= len(counts) - 2

    def test_order_follows_seed_and_epoch(self):
        sampler, other = self.build(seed=0), self.build(seed=1)
        first = list(sampler)
        assert list(sampler) == first
        assert list(other) != first
        sampler.set_epoch(5)
        assert list(sampler) != first
        sampler.set_epoch(0)
        assert list(sampler) == first


def test_workers_draw_other_augmentations_in_each_epoch_and_the_same_after_a_resume(root):
    def epoch(loader, seed):
        torch.manual_seed(seed)
        return torch.cat([images for images, _ in loader])

    loader = Runner.build_dataloader(
        {
            "dataset": {
                "type": "TimmDataset",
                "root": str(root),
                "transform": {"input_size": 32, "is_training": True, "re_prob": 0.5},
            },
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "batch_size": 4,
            "num_workers": 2,
            "collate_fn": {"type": "default_collate"},
            "worker_init_fn": {"type": "torch_worker_seed"},
        },
        seed=0,
    )
    first, second = epoch(loader, 0), epoch(loader, 1)
    assert not torch.equal(first, second)
    assert torch.equal(epoch(loader, 1), second)


@pytest.mark.parametrize("augment", ["rand-m10-n1-inc1", "rand-m0-n1", "original", "augmix-m10"])
def test_posterizing_to_no_bits_is_black(root, augment):
    """RandAugment's noise leads to this magnitude about once in a thousand images."""
    settings = {"input_size": 32, "is_training": True, "auto_augment": augment}
    steps = build(root, transform=settings).transform.transforms
    (step,) = (step for step in steps if hasattr(step, "ops") or hasattr(step, "policy"))
    operations = [op for ops in getattr(step, "policy", [getattr(step, "ops", ())]) for op in ops]
    posterizing = [op for op in operations if op.name.startswith("Posterize")]
    assert posterizing
    for operation in posterizing:
        image = Image.new("RGB", (4, 3), "teal")
        assert operation.aug_fn(image, 0).getextrema() == ((0, 0),) * 3
        assert operation.aug_fn(image, 4).getextrema() == ((0, 0), (128, 128), (128, 128))


def test_timm_itself_is_left_as_it_is():
    from timm.data import auto_augment

    assert auto_augment.NAME_TO_OP["Posterize"] is auto_augment.posterize
