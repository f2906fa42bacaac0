"""Digit scenes in COCO's format: pycocotools reads what the generator made."""

import json

import numpy as np
import pytest
from PIL import Image

from linsight.data.digits import DETECTION, digit_scene
from linsight.data.digits_coco import coco_dict, write_coco

pycoco = pytest.importorskip("pycocotools.coco")
SCENE = {"size": (96, 128), "digits": (0, 5), "max_overlap": 0.3}


def test_round_trip(tmp_path):
    folder = write_coco(tmp_path / "a" / "digits", train=12, test=5, **SCENE)
    assert [path.name for path in folder.parent.iterdir()] == ["digits"]
    for split, length in (("train", 12), ("test", 5)):
        coco = pycoco.COCO(folder / f"instances_{split}.json")
        assert len(coco.imgs) == length
        assert [cat["name"] for cat in coco.cats.values()] == list("0123456789")
        for index, image in coco.imgs.items():
            scene = digit_scene(index, split, **{**DETECTION, **SCENE})
            stored = Image.open(folder / "images" / split / image["file_name"])
            np.testing.assert_array_equal(stored, scene.image)
            semantic = Image.open(folder / "semantic" / split / image["file_name"])
            np.testing.assert_array_equal(semantic, scene.semantic)
            assert (image["height"], image["width"]) == SCENE["size"]
            annotations = coco.loadAnns(coco.getAnnIds(index))
            assert [a["category_id"] - 1 for a in annotations] == scene.labels.tolist()
            for annotation, mask, box in zip(annotations, scene.masks, scene.boxes, strict=True):
                np.testing.assert_array_equal(coco.annToMask(annotation), mask)
                x, y, w, h = annotation["bbox"]
                assert [x, y, x + w, y + h] == box.tolist()
                assert annotation["area"] == mask.sum()


def test_coco_takes_itself_for_perfect(tmp_path):
    from pycocotools.cocoeval import COCOeval

    write_coco(tmp_path / "digits", train=1, test=8, **SCENE)
    truth = pycoco.COCO(tmp_path / "digits" / "instances_test.json")
    found = truth.loadRes([{**a, "score": 1.0} for a in truth.dataset["annotations"]])
    for kind in ("bbox", "segm"):
        evaluation = COCOeval(truth, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == pytest.approx(1)


def test_a_finished_folder_is_taken_and_another_is_not(tmp_path):
    folder = write_coco(tmp_path / "digits", train=2, test=1, **SCENE)
    stamp = (folder / "instances_train.json").stat().st_mtime_ns
    write_coco(folder, train=2, test=1, **SCENE)
    assert (folder / "instances_train.json").stat().st_mtime_ns == stamp
    with pytest.raises(FileExistsError, match="train 2 instead of 3"):
        write_coco(folder, train=3, test=1, **SCENE)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="holds no digit scenes"):
        write_coco(tmp_path / "mine", train=1, test=1)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_a_broken_off_folder_is_never_there(tmp_path, monkeypatch):
    from linsight.data import digits_coco

    def fail(index, *_, **__):
        if index == 3:
            raise KeyboardInterrupt
        return digit_scene(index)

    monkeypatch.setattr(digits_coco, "digit_scene", fail)
    with pytest.raises(KeyboardInterrupt):
        write_coco(tmp_path / "digits", train=5, test=1)
    assert list(tmp_path.iterdir()) == []


def test_another_process_may_be_faster(tmp_path, monkeypatch):
    from linsight.data import digits_coco

    write_split = digits_coco._write_split

    def overtaken(*arguments):
        monkeypatch.setattr(digits_coco, "_write_split", write_split)
        write_coco(tmp_path / "digits", train=2, test=1, **SCENE)
        write_split(*arguments)

    monkeypatch.setattr(digits_coco, "_write_split", overtaken)
    write_coco(tmp_path / "digits", train=2, test=1, **SCENE)
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_the_dictionary_is_json():
    made = coco_dict("test", 3)
    assert json.loads(json.dumps(made)) == made
    with pytest.raises(ValueError, match="length must be 1 or more, got 0"):
        coco_dict("test", 0)
    with pytest.raises(ValueError, match="split"):
        coco_dict("val", 1)
