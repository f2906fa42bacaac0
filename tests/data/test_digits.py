"""Digit scenes keep what they promise, whatever their settings."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from linsight.data import digits as module
from linsight.data.digits import (
    DETECTION,
    FORM_STARTS,
    DigitClassification,
    DigitSegmentation,
    Scene,
    digit_scene,
    load_split,
)
from linsight.data.digits_figure import draw_digit_scenes

CROWD = {**DETECTION, "size": (96, 160), "digits": (3, 8), "max_overlap": 0.3}


def check(scene: Scene, height: int, width: int) -> None:
    count = len(scene.labels)
    assert scene.image.shape == (height, width, 3)
    assert scene.masks.shape == (count, height, width)
    assert scene.boxes.shape == (count, 4)
    assert (scene.image.dtype, scene.labels.dtype) == (np.uint8, np.int64)
    assert (scene.boxes.dtype, scene.masks.dtype) == (np.float32, bool)
    assert scene.semantic.dtype == np.uint8
    assert scene.masks.sum(0).max(initial=0) <= 1, "the masks overlap"
    semantic = np.zeros((height, width), np.uint8)
    for label, box, mask in zip(scene.labels, scene.boxes, scene.masks, strict=True):
        ys, xs = mask.nonzero()
        assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        semantic[mask] = label + 1
    np.testing.assert_array_equal(scene.semantic, semantic)


@settings(max_examples=60, deadline=None)
@given(
    index=st.integers(0, 10**12),
    split=st.sampled_from(["train", "test"]),
    seed=st.integers(0, 2**63),
    size=st.tuples(st.integers(17, 130), st.integers(17, 130)),
    digits=st.tuples(st.integers(0, 5), st.integers(0, 5)).map(sorted).map(tuple),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    max_overlap=st.floats(0, 1),
    clutter=st.integers(0, 12),
    noise=st.floats(0, 1),
    distortion=st.sampled_from((0.0, 0.5, 1.0)),
)
def test_any_setting(
    index, split, seed, size, digits, shares, max_overlap, clutter, noise, distortion
):
    least = 8 / min(size) + 1e-9
    small, large = sorted(least + share * (1 - least) for share in shares)
    scene = digit_scene(
        index,
        split,
        seed=seed,
        size=size,
        digits=digits,
        digit_size=(small, min(large, 1)),
        max_overlap=max_overlap,
        clutter=clutter,
        noise=noise,
        distortion=distortion,
    )
    check(scene, *size)
    assert min(digits[0], 1) <= len(scene.labels) <= digits[1]


def test_the_test_split_shares_no_handwriting():
    images, labels = zip(*(load_split(split) for split in ("train", "test")), strict=True)
    assert [len(part) for part in images] == [1415, 382]
    assert set(labels[1]) == set(range(10))
    everything = np.concatenate(images).reshape(-1, 64)
    assert len(np.unique(everything, axis=0)) == 1797
    sequence = "".join(map(str, np.concatenate(labels)))
    # The forms share a beginning, of which a few digits are lost.
    assert sum(sequence.startswith("012345678901234567", start) for start in FORM_STARTS) >= 11
    assert len(images[0]) in FORM_STARTS, "the split cuts a form"


def test_another_process_makes_the_same_scenes_and_needs_no_mmengine():
    code = """
import hashlib, sys, types
sys.modules["mmengine"] = None
# The package without its __init__, which registers data sets with mmengine.
for name, path in (("linsight", None), ("linsight.data", sys.argv[1])):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [path]
from linsight.data.digits import digit_scene
"""
    make = """
digest = hashlib.sha256()
for index in (0, 5, 10**9):
    scene = digit_scene(index, "test", size=(96, 160), digits=(3, 8), digit_size=(0.2, 0.4))
    for part in (scene.image, scene.labels, scene.boxes, scene.masks, scene.semantic):
        digest.update(part.tobytes())
"""
    here: dict = {"hashlib": hashlib, "digit_scene": digit_scene}
    exec(make, here)
    command = [sys.executable, "-c", code + make + "print(digest.hexdigest())"]
    command.append(str(Path(module.__file__).parent))
    other = subprocess.run(command, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == here["digest"].hexdigest()


def test_index_split_and_seed_each_change_the_scene():
    scenes = [
        digit_scene(0),
        digit_scene(1415),
        digit_scene(0, "test"),
        digit_scene(0, seed=1),
    ]
    assert len({scene.image.tobytes() for scene in scenes}) == 4
    assert scenes[0].labels == scenes[1].labels, "every 1415 scenes show each handwriting once"


def test_distortion_bends_the_digit_alone():
    straight, bent = (
        digit_scene(7, clutter=0, noise=0, digit_size=(0.9, 0.9), distortion=distortion)
        for distortion in (0.0, 0.4)
    )
    assert np.array_equal(straight.labels, bent.labels)
    assert not np.array_equal(straight.masks, bent.masks)


def test_occlusion_is_limited():
    frames_apart = [digit_scene(i, **{**CROWD, "max_overlap": 0}) for i in range(20)]
    for scene in frames_apart:
        x1, y1, x2, y2 = scene.boxes.T[:, :, None]
        meet = (x2 > x1.T) & (x1 < x2.T) & (y2 > y1.T) & (y1 < y2.T)
        assert meet.sum() == len(scene.boxes), "max_overlap=0, and two boxes meet"
    crowded = [digit_scene(i, **{**CROWD, "max_overlap": 1}) for i in range(20)]
    assert min(mask.sum() for scene in crowded for mask in scene.masks) > 10


def test_ink_stands_out_from_paper():
    luma = np.array([0.299, 0.587, 0.114])
    for index in range(60):
        scene = digit_scene(index, clutter=0, noise=0)
        grey = scene.image @ luma / 255
        assert abs(grey[scene.masks[0]].mean() - grey[scene.semantic == 0].mean()) > 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"index": -1}, "index must be .* -1"),
        ({"index": 0.5}, "index must be .* 0.5"),
        ({"split": "val"}, "split must be 'train' or 'test', got 'val'"),
        ({"seed": -1}, "seed must be"),
        ({"size": 10}, "too small for digit_size .* take a size of 13 or more"),
        ({"size": "64"}, "size must be a whole number"),
        ({"size": (64, 64, 3)}, "size must be a whole number"),
        ({"digits": (3, 2)}, r"digits must be .* got \(3, 2\)"),
        ({"digits": -1}, "digits must be"),
        ({"digit_size": (0.9, 0.5)}, "digit_size must be"),
        ({"digit_size": (0.5, 1.5)}, "digit_size must be"),
        ({"digit_size": 0.5}, "digit_size must be"),
        ({"max_overlap": 2}, "max_overlap must be"),
        ({"clutter": 1.5}, "clutter must be"),
        ({"noise": -0.1}, "noise must be"),
        ({"distortion": 1.5}, "distortion must be"),
        ({"noise": float("nan")}, "noise must be"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        digit_scene(**{"index": 0, **arguments})


@pytest.mark.parametrize("missing", ["sklearn.datasets", "cv2"])
def test_missing_packages_say_how_to_install_them(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    module._fields.cache_clear()
    load_split.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'linsight\[train\]'"):
        digit_scene(0)


def test_classification():
    plain = DigitClassification("test", length=20)
    image, label = plain[3]
    assert isinstance(image, Image.Image)
    assert (image.size, image.mode) == ((64, 64), "RGB")
    assert [plain[i][1] for i in range(20)] == load_split("test")[1][:20].tolist()
    changed = DigitClassification("test", 20, np.asarray, str, size=(48, 80))
    assert changed[3][0].shape == (48, 80, 3)
    assert changed[3][1] == str(label)
    assert len(list(plain)) == 20
    assert len(DigitClassification("train")) == 14150
    assert len(DigitClassification("test")) == 1528
    for index in (-1, 20):
        with pytest.raises(IndexError):
            plain[index]
    with pytest.raises(ValueError, match="length"):
        DigitClassification(length=0)
    with pytest.raises(ValueError, match="size"):
        DigitClassification(size=8)
    with pytest.raises(TypeError):
        DigitClassification(sise=64)


def test_segmentation():
    image, mask = DigitSegmentation("train", size=(120, 200))[7]
    scene = digit_scene(7, **{**DETECTION, "size": (120, 200)})
    np.testing.assert_array_equal(image, scene.image)
    np.testing.assert_array_equal(mask, scene.semantic)
    assert len(DigitSegmentation.classes) == 11
    swapped = DigitSegmentation("train", transforms=lambda image, mask: (mask, image))
    assert swapped[0][0].mode == "L"


def test_the_figure(tmp_path):
    pytest.importorskip("matplotlib")
    draw_digit_scenes(tmp_path / "docs" / "scenes.png")
    assert Image.open(tmp_path / "docs" / "scenes.png").width == 1200
    assert (tmp_path / "docs" / "scenes.png").stat().st_size < 300_000
