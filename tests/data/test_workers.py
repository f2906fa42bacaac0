"""Data sets in workers that are not forked, and within mmengine's wrappers."""

import pickle

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS
from PIL import Image
from torch.utils.data import DataLoader

import linsight.data.classification
import linsight.data.segmentation  # noqa: F401
from linsight.data.loading import DataError

AUGMENTED = {"is_training": True, "input_size": 32, "auto_augment": "rand-m9-mstd0.5-inc1"}


@pytest.fixture
def root(tmp_path):
    """Four images of cats and one of a dog, and masks of which one has the second class."""
    for i in range(5):
        folder = tmp_path / ("dog" if i == 4 else "cat")
        for each in (folder, tmp_path / "masks"):
            each.mkdir(exist_ok=True)
        image = np.full((40, 40, 3), 40 * i, np.uint8)
        Image.fromarray(image).save(folder / f"{i}.png")
        mask = np.zeros((40, 40), np.uint8)
        mask[:2] = i == 3
        mask[-2:] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / f"{i}.png")
    return tmp_path


def configs(root):
    folder = {"type": "TimmDataset", "root": str(root), "transform": AUGMENTED}
    scenes = {"size": 64, "length": 4}
    return {
        "folder": folder | {"class_map": {"cat": 0, "dog": 1}},
        "on the device": folder | {"class_map": {"cat": 0, "dog": 1}, "augment_on_device": True},
        "digits": {"type": "DigitClassification", "transform": AUGMENTED, "length": 4},
        "masks": {
            "type": "SegmentationFolder",
            "root": str(root),
            "images": "cat",
            "masks": "masks",
            "classes": ["a", "b"],
            "transforms": [{"type": "RandomClassCrop", "size": 32}],
        },
        "digit masks": {"type": "DigitSegmentation", **scenes},
    }


KINDS = ("folder", "on the device", "digits", "masks", "digit masks")


@pytest.mark.parametrize("kind", KINDS)
def test_data_sets_are_pickled(root, kind):
    dataset = DATASETS.build(configs(root)[kind])
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(copy) == len(dataset)
    assert copy.name_of(0) == dataset.name_of(0)
    for x, y in zip(copy.read(0), dataset.read(0), strict=True):
        assert np.array_equal(x, y)
    torch.manual_seed(0)
    assert copy[0] is not None


def test_workers_are_spawned(root):
    dataset = DATASETS.build(configs(root)["masks"])
    (batch,) = DataLoader(dataset, 4, num_workers=1, multiprocessing_context="spawn")
    assert batch[0].shape == (4, 3, 32, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_wrappers_of_mmengine(root, kind):
    config = configs(root)[kind]
    single = DATASETS.build(config)
    repeated = DATASETS.build({"type": "RepeatDataset", "dataset": config, "times": 3})
    joined = DATASETS.build({"type": "ConcatDataset", "datasets": [config, config]})
    assert (len(repeated), len(joined)) == (3 * len(single), 2 * len(single))
    assert repeated.metainfo == joined.metainfo == single.metainfo
    balanced = DATASETS.build(
        {"type": "ClassBalancedDataset", "dataset": config, "oversample_thr": 0.5}
    )
    for dataset in (repeated, joined, balanced):
        assert len(dataset[len(dataset) - 1]) == 2


def test_rare_classes_are_drawn_more_often(root):
    config = configs(root)
    folder = {"type": "ClassBalancedDataset", "dataset": config["folder"], "oversample_thr": 0.8}
    # The dog's share is 1 / 5, and so its picture comes sqrt(0.8 / 0.2) = 2 times.
    assert DATASETS.build(folder).repeat_indices == [0, 1, 2, 3, 4, 4]
    masks = DATASETS.build(config["masks"])
    assert [masks.get_cat_ids(i) for i in range(4)] == [[0], [0], [0], [0, 1]]


def test_rare_classes_within_wrappers(root):
    folder = configs(root)["folder"]
    twice = {"type": "RepeatDataset", "dataset": folder, "times": 2}
    joined = {"type": "ConcatDataset", "datasets": [folder, twice]}
    balanced = {"type": "ClassBalancedDataset", "dataset": joined, "oversample_thr": 0.8}
    dataset = pickle.loads(pickle.dumps(DATASETS.build(balanced)))
    dogs = [4, 4, 9, 9, 14, 14]
    assert [index for index in dataset.repeat_indices if index % 5 == 4] == dogs
    assert len(dataset) == 12 + len(dogs)
    around = {"type": "RepeatDataset", "dataset": balanced, "times": 2}
    assert len(DATASETS.build(around)) == 36


@pytest.mark.parametrize("kind", ["folder", "masks"])
def test_nothing_can_be_read(root, kind):
    """Whatever is tolerated, there is no next image to take."""
    dataset = DATASETS.build(configs(root)[kind] | {"corrupt_tolerance": 1.0})
    for file in root.glob("[cd]*/*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of the \d images can be read; the last error: "):
        dataset[0]
