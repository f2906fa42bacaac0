"""Faulty COCO files are named before training, and faulty images do not stop it."""

import copy
import json
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import linsight.kernels.mmcv_operators  # noqa: F401  before mmdet

pytest.importorskip("mmdet", reason="mmdet is not installed: pip install linsight[det]")

from mmdet.utils import register_all_modules
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, DefaultScope
from pycocotools import mask as run_length

from linsight.data.coco import remove_faulty
from linsight.data.loading import DataCheckHook, DataError
from linsight.data.outlines import count_pixels
from linsight.heads.detection_metric import QuietCocoMetric

CLASSES = ("cat", "dog")
SQUARE = [[4, 4, 14, 4, 14, 14, 4, 14]]


def content(images: int = 4) -> dict:
    """Annotations of two objects on each image but the last, which has no object."""
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 32, "height": 24} for i in range(images)
        ],
        "annotations": [
            {
                "id": i + 1,
                "image_id": i // 2,
                "category_id": 5 + i % 2,
                "bbox": [4, 4, 10, 10],
                "area": 100,
                "iscrowd": 0,
                "segmentation": SQUARE,
            }
            for i in range(2 * images - 2)
        ],
        "categories": [{"id": 5, "name": "cat"}, {"id": 6, "name": "dog"}],
    }


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """Types are looked for in mmdet first, until these tests are over."""
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


@pytest.fixture(autouse=True)
def own_logger(monkeypatch) -> None:
    """A logger for this test: an earlier training's logger writes where nobody looks any more."""
    monkeypatch.setattr(MMLogger, "_instance_dict", OrderedDict())


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(4):
        pixels = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def dataset(folder: Path, images: Path, written: dict | str, **options):
    text = written if isinstance(written, str) else json.dumps(written)
    (folder / "instances.json").write_text(text)
    loading = {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True}
    settings = {
        "type": "CheckedCocoDataset",
        "data_root": str(folder),
        "ann_file": "instances.json",
        "data_prefix": {"img": f"{images}/"},
        "metainfo": {"classes": CLASSES},
        "serialize_data": False,  # This spares a collection of garbage.
        "pipeline": [{"type": "LoadImageFromFile"}, loading, {"type": "PackDetInputs"}],
    }
    return DATASETS.build(settings | options)


def test_a_right_file_is_mmdets_own(tmp_path, images, capfd):
    ours = dataset(tmp_path, images, content())
    theirs = dataset(tmp_path, images, content(), type="mmdet.CocoDataset")
    assert "faulty" not in capfd.readouterr().err
    assert len(ours) == len(theirs) == 4
    for i in range(4):
        assert ours.get_data_info(i) == theirs.get_data_info(i)
    assert len(ours[3]["data_samples"].gt_instances) == 0
    filtered = {"filter_cfg": {"filter_empty_gt": True}}
    assert len(dataset(tmp_path, images, content(), **filtered)) == 3


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", r"instances\.json \(0 bytes\) is no JSON"),
        ('{"images": [', "is no JSON"),
        ("[]", "holds a list, no COCO object"),
        ("{}", "has no images: COCO's format needs the lists images, annotations, categories"),
        (content() | {"images": []}, "has no images"),
        (content() | {"annotations": []}, "has no annotations"),
        (content() | {"categories": []}, "has no categories"),
        (content() | {"images": content()["images"] * 2}, "images has the id 0 twice"),
        (
            content() | {"categories": [{"id": 1, "name": "person"}]},
            r"2 of the data set's 2 classes \(cat, dog\) are not among the 1 categories .*person",
        ),
        (
            content() | {"categories": content()["categories"][::-1]},
            r"metainfo\.classes to \('dog', 'cat'\)",
        ),
        (
            content() | {"categories": [*content()["categories"], {"id": 9, "name": "dog"}]},
            "several categories of the same name: dog",
        ),
        (
            content() | {"images": [{"id": 0, "file_name": "0.png", "width": 0, "height": 3}]},
            r"image 0 \(0\.png\) is 0 x 3 pixels",
        ),
        (
            content() | {"images": [{"id": 0, "file_name": "a.png", "width": "w", "height": 3}]},
            r"image 0 \(a\.png\) has width and height \('w', 3\), expected numbers",
        ),
    ],
)
def test_a_file_of_no_use_is_refused(tmp_path, images, written, message):
    with pytest.raises(DataError, match=message):
        dataset(tmp_path, images, written)


@pytest.mark.parametrize(
    ("key", "test_mode", "message"),
    [
        ("area", False, r"entry 2 of annotations \(id 3\) has no area; area w \* h will do"),
        ("bbox", True, "has no bbox"),
        ("iscrowd", True, "has no iscrowd; iscrowd 0 will do"),
    ],
)
def test_an_entry_that_lacks_something_is_named(tmp_path, images, key, test_mode, message):
    written = content()
    del written["annotations"][2][key]
    if key == "bbox":  # which the outline would give
        del written["annotations"][2]["segmentation"]
    with pytest.raises(DataError, match=message):
        dataset(tmp_path, images, written, test_mode=test_mode)


MENDED = [
    {"iscrowd": "0"},
    {"iscrowd": False},
    {"category_id": "5"},
    {"image_id": "1"},
    {"id": "3"},
    {"bbox": ["4", "4.0", "10", "10"]},
    {"area": "100"},
    {"id": None},
]


@pytest.mark.parametrize("test_mode", [False, True])
@pytest.mark.parametrize("change", MENDED, ids=str)
def test_texts_for_numbers_are_mended(tmp_path, images, change, test_mode, capfd):
    wanted = dataset(tmp_path, images, content(), test_mode=test_mode)[1]["data_samples"]
    written = content()
    written["annotations"][2] |= change
    if change == {"id": None}:
        del written["annotations"][2]["id"]
    found = dataset(tmp_path, images, written, test_mode=test_mode)
    said = capfd.readouterr()
    assert re.search("1 annotations with(out an id| texts .*): mended", said.out + said.err)
    instances = found[1]["data_samples"].gt_instances
    assert torch.equal(instances.bboxes.tensor, wanted.gt_instances.bboxes.tensor)
    assert instances.labels.equal(wanted.gt_instances.labels)
    metric = QuietCocoMetric(ann_file=str(tmp_path / "instances.json"))
    assert len(metric._coco_api.getAnnIds(iscrowd=0)) == 6


def test_ids_that_are_words(tmp_path, images):
    written = content()
    for image in written["images"]:
        image["id"] = f"picture {image['id']}"
    for annotation in written["annotations"]:
        annotation["image_id"] = f"picture {annotation['image_id']}"
    checked = dataset(tmp_path, images, written)
    assert [len(checked.get_data_info(i)["instances"]) for i in range(4)] == [2, 2, 2, 0]


def test_true_crowds_are_counted(tmp_path, images, capfd):
    written = content()
    for annotation, flag in zip(written["annotations"][:2], (True, "1"), strict=True):
        annotation["iscrowd"] = flag
    dataset(tmp_path, images, written)
    said = capfd.readouterr()
    assert "2 with an iscrowd flag (1, 2)" in said.out + said.err


@pytest.mark.parametrize(
    ("box", "hint"),
    [([20, 10, 30, 20], True), ([-5, 4, 10, 10], False), ([4, 4, 1, 1], None)],
)
def test_boxes_beyond_the_edges(tmp_path, images, box, hint, capfd):
    written = content()
    for annotation in written["annotations"]:
        annotation["bbox"] = box
    assert len(dataset(tmp_path, images, written).get_data_info(0)["instances"]) == 2
    said = capfd.readouterr()
    text = said.out + said.err
    assert ("of 6 annotations reach beyond the edges" in text) == (hint is not None)
    assert ("they look like x1, y1, x2, y2" in text) == bool(hint)


def test_rare_classes_within_wrappers(tmp_path, images):
    checked = dataset(tmp_path, images, content())
    config = {"type": "RepeatDataset", "dataset": checked, "times": 2}
    balanced = {"type": "ClassBalancedDataset", "dataset": config, "oversample_thr": 1.5}
    # Each class is in 3 of 4 images, and so comes sqrt(1.5 / 0.75) times, rounded up.
    assert len(DATASETS.build(balanced)) == 2 * (3 * 2 + 1)


def test_a_missing_file_is_named(tmp_path, images):
    with pytest.raises(DataError, match=r"absent\.json' does not exist: set data_root"):
        dataset(tmp_path, images, content(), ann_file="absent.json")


def test_images_to_be_tested_need_no_annotations(tmp_path, images):
    written = content()
    del written["annotations"]
    assert len(dataset(tmp_path, images, written, test_mode=True)) == 4


FAULTS = [
    ({"bbox": [4, 4, 0, 10]}, "with a box without width or height"),
    ({"bbox": [4, 4, 10, -3]}, "with a box without width or height"),
    ({"bbox": [4, 4, float("nan"), 10]}, "with a box that is not finite"),
    ({"bbox": [40, 4, 10, 10]}, "with a box outside the image"),
    ({"bbox": [4, 4, 10]}, "with a box that is not four numbers"),
    ({"bbox": [4, 4, 0.5, 10]}, "with a box less than a pixel wide or high"),
    ({"category_id": 7}, "of a category that the file does not list"),
    ({"image_id": 99}, "of an image that the file does not list"),
    ({"segmentation": []}, "without a mask"),
    ({"segmentation": [[4, 4, 9, 9]]}, "with polygons of fewer than 3 points"),
    ({"segmentation": SQUARE[0]}, "with polygons of fewer than 3 points"),
    (
        {"segmentation": {"size": [32, 24], "counts": [768]}},
        "with run lengths of another size than the image's",
    ),
    (
        {"segmentation": {"size": [24, 32], "counts": [5, 5]}},
        "with run lengths of another size than the image's",
    ),
]


@pytest.mark.parametrize(("change", "reason"), FAULTS)
def test_a_faulty_annotation_is_left_out_and_counted(tmp_path, images, change, reason, capfd):
    written = content()
    written["annotations"][2] |= change
    checked = dataset(tmp_path, images, written)
    said = capfd.readouterr()
    assert f"1 of 6 annotations are faulty: 1 {reason} (3)" in said.out + said.err
    assert [len(checked.get_data_info(i)["instances"]) for i in range(4)] == [2, 1, 2, 0]
    for i in range(4):
        found = checked[i]["data_samples"].gt_instances
        assert found.bboxes.tensor.isfinite().all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ignore": 1}, "with an ignore flag"),
        ({"iscrowd": 1}, "with an iscrowd flag"),
        ({"category_id": 9}, "of a category that is none of the data set's classes"),
    ],
)
def test_an_annotation_that_mmdet_does_not_learn_is_counted(
    tmp_path, images, change, reason, capfd
):
    written = content()
    written["categories"].append({"id": 9, "name": "bird"})
    written["annotations"][2] |= change
    checked = dataset(tmp_path, images, written)
    said = capfd.readouterr()
    wanted = f"from 1 of 6 annotations nothing is learned: 1 {reason} (3)"
    assert wanted in said.out + said.err
    learned = [len(checked[i]["data_samples"].gt_instances) for i in range(4)]
    assert learned == [2, 1, 2, 0]
    for annotation in written["annotations"]:
        annotation |= change
    with pytest.raises(DataError, match=rf"none of the 4 images .* is left: .* 6 {reason}"):
        dataset(tmp_path, images, written)


@pytest.mark.parametrize("area", [0, -100, None])
def test_objects_without_an_area_are_learned_all_the_same(tmp_path, images, area, capfd):
    """mmdet drops them all, and trains on pictures without objects to the end."""
    written = content()
    for annotation in written["annotations"]:
        annotation["area"] = area
    checked = dataset(tmp_path, images, written)
    said = capfd.readouterr()
    assert "area of 6 of 6 annotations is not above 0 (1, 2, 3, ...)" in said.out + said.err
    assert [len(checked[i]["data_samples"].gt_instances) for i in range(4)] == [2, 2, 2, 0]
    metric = QuietCocoMetric(ann_file=str(tmp_path / "instances.json"), metric="bbox")
    assert {a["area"] for a in metric._coco_api.anns.values()} == {100}


def test_boxes_in_shares_of_the_image_are_named(tmp_path, images):
    written = content()
    for annotation in written["annotations"]:
        annotation["bbox"] = [0.1, 0.2, 0.3, 0.4]
    with pytest.raises(DataError, match=r"6 with a box less .*; bbox is x, y, w, h in pixels, not"):
        dataset(tmp_path, images, written)


def test_images_below_the_least_size_are_counted(tmp_path, images, capfd):
    written = content()
    written["images"][1]["width"] = 8
    checked = dataset(tmp_path, images, written, filter_cfg={"min_size": 20})
    assert len(checked) == 3
    said = capfd.readouterr()
    assert "1 of the 4 images" in said.out + said.err
    assert "filter_cfg.min_size=20" in said.out + said.err


def test_other_polygons_of_an_object_stay(tmp_path, images):
    written = content()
    written["annotations"][0]["segmentation"] = [[1, 1, 2, 2], *SQUARE]
    faults = remove_faulty(copy.deepcopy(written), masks=True)
    assert faults == {"with polygons of fewer than 3 points": [1]}
    assert dataset(tmp_path, images, written).get_data_info(0)["instances"][0]["mask"] == SQUARE


def test_masks_count_where_they_are_loaded(tmp_path, images):
    written = content()
    written["annotations"][0]["segmentation"] = [[4, 4]]
    boxes_alone = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_bbox": True}]
    checked = dataset(tmp_path, images, written, pipeline=boxes_alone)
    assert len(checked.get_data_info(0)["instances"]) == 2
    with pytest.raises(DataError, match=r"3 points \(1\)\. Mend or remove them to evaluate masks"):
        dataset(tmp_path, images, written, test_mode=True)


def test_no_object_left(tmp_path, images):
    written = content()
    for annotation in written["annotations"]:
        annotation["bbox"][2] = 0
    with pytest.raises(DataError, match=r"none of the 4 images .* is left"):
        dataset(tmp_path, images, written, filter_cfg={"filter_empty_gt": True})


class TestImages:
    def test_one_that_does_not_exist(self, tmp_path, images, capfd):
        written = content()
        written["images"][1]["file_name"] = "gone.png"
        assert len(dataset(tmp_path, images, written)) == 3
        said = capfd.readouterr()
        assert "1 of the 4 images" in said.out + said.err
        for options in ({"test_mode": True}, {"corrupt_tolerance": 0.0}):
            with pytest.raises(DataError, match=r"gone\.png\): set .*data_prefix\.img"):
                dataset(tmp_path, images, written, **options)

    def test_a_wrong_folder(self, tmp_path, images):
        with pytest.raises(DataError, match=r"4 of the 4 images .* do not exist"):
            dataset(tmp_path, tmp_path / "nowhere", content())

    @pytest.mark.parametrize("kept", [0, 100])
    def test_one_that_is_truncated(self, tmp_path, images, kept, caplog):
        for name in os.listdir(images):
            whole = (images / name).read_bytes()
            (tmp_path / name).write_bytes(whole[:kept] if name == "1.png" else whole)
        checked = dataset(tmp_path, tmp_path, content())
        for i in range(4):
            assert checked[i]["inputs"].shape == (3, 24, 32)
        assert checked.corrupt.tolist() == [False, True, False, False]
        runner = SimpleNamespace(
            logger=logging.getLogger("test"), train_dataloader=SimpleNamespace(dataset=checked)
        )
        DataCheckHook().after_train_epoch(runner)
        assert "training data: 1 of 4 images could not be read" in caplog.text
        assert "1.png" in caplog.text

        os.truncate(tmp_path / "2.png", 50)
        with pytest.raises(DataError, match=r"2 of 4 images .*more than corrupt_tolerance allows"):
            checked[2]
        with pytest.raises(DataError, match=r"1\.png could not be read"):
            dataset(tmp_path, tmp_path, content(), test_mode=True)[1]


@pytest.mark.parametrize("size", [(24, 32), (1, 7), (300, 500)])
def test_pixels_of_compressed_run_lengths(size):
    rng = np.random.default_rng(0)
    for share in (0.0, 0.001, 0.3, 1.0):
        mask = np.asfortranarray(rng.random(size) < share, np.uint8)
        counts = run_length.encode(mask)["counts"]
        assert count_pixels(counts) == count_pixels(counts.decode()) == size[0] * size[1]
    assert count_pixels(counts[:-1]) != size[0] * size[1]
    assert count_pixels(b"\x00z") is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"roi_head": 3, "rpn_head": 1, "backbone": 0}, r"model\.roi_head\.num_classes is 3"),
        ({"roi_head": 2, "rpn_head": 1, "backbone": 0}, None),
    ],
)
def test_heads_and_classes_are_compared(tmp_path, images, model, message):
    heads = torch.nn.ModuleDict({name: torch.nn.Identity() for name in model})
    for name, count in model.items():
        heads[name].num_classes = count
    data = SimpleNamespace(dataset=dataset(tmp_path, images, content()))
    runner = SimpleNamespace(model=heads, test_dataloader=data)
    refused = pytest.raises(DataError, match=message) if message else nullcontext()
    with refused:
        DataCheckHook().before_test(runner)
