"""The pages of docs/ on real data, their lines run as written on little data of the same form."""

import gzip
import importlib
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from linsight.data.loading import DataError
from linsight.data.sources import Sample, Source
from linsight.tools import fashion_mnist, trees
from linsight.tools.config import load_config
from linsight.tools.recipe_objects import Objects
from linsight_command import app

ROOT = Path(__file__).parents[2]


def run_page(name: str, folder: Path, monkeypatch, *small: str) -> None:
    """Run the lines of a page in a folder, with words behind each training that make it short."""
    monkeypatch.chdir(folder)
    text = (ROOT / "docs" / f"{name}.md").read_text()
    blocks = re.findall(r"^```console\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    for line in lines:
        program, *words = shlex.split(line)
        if program == "python":
            command = typer.main.get_command(importlib.import_module(words[1]).app)
            command.main(words[2:], standalone_mode=False)
        if program != "linsight":
            continue
        if words[0] == "train":
            data, model = (words[words.index(option) + 1] for option in ("--data", "--model"))
            words += [*small, "--work-dir", f"work_dirs/{data}_{model}"]
        for place, word in enumerate(words):
            if "*." in word:  # a shell puts the file's name there
                (words[place],) = map(str, folder.glob(word))
        if words[0] == "test":
            shutil.rmtree(folder / "fashion" / "train", ignore_errors=True)  # it is not needed
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (line, result.output, result.exception)


def write_idx(file: Path, values: np.ndarray) -> None:
    head = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
    with (gzip.open if file.suffix == ".gz" else open)(file, "wb") as stream:
        stream.write(head + values.tobytes())


@pytest.fixture
def idx(tmp_path):
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    for prefix, count, ending in (("train", 240, ".gz"), ("t10k", 20, "")):
        labels = (np.arange(count) // 2 % 10).astype(np.uint8)
        images = np.random.default_rng(0).integers(0, 99, (count, 28, 28), np.uint8)
        images += 15 * labels[:, None, None]
        write_idx(folder / f"{prefix}-images-idx3-ubyte{ending}", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{ending}", labels)
    return folder


def test_fashion_mnist(idx, tmp_path, monkeypatch):
    small = ["--model", "test_resnet", "--image-size", "32", "--epochs", "1", "--workers", "0"]
    run_page("fashion_mnist", tmp_path, monkeypatch, *small)
    data = tmp_path / "fashion"
    assert [len([*(data / split).rglob("*.png")]) for split in ("val", "test")] == [20, 20]
    lists = tmp_path / "work_dirs" / "fashion_rala_vit_nano" / "data"
    assert len((lists / "train.csv").read_text().splitlines()) == 1 + 220
    (first, *_) = sorted((data / "test" / "dress").iterdir())
    images = fashion_mnist.read_idx(idx, "t10k-images", 3)
    assert np.array_equal(np.asarray(Image.open(first)), images[int(first.stem)])
    assert {len([*f.iterdir()]) for f in (data / "test").iterdir()} == {2}


def test_faults_of_idx_files(idx):
    with pytest.raises(DataError, match="has no file other-idx1-ubyte"):
        fashion_mnist.read_idx(idx, "other", 1)
    with pytest.raises(DataError, match="is not an IDX file of bytes with 3 axes"):
        fashion_mnist.read_idx(idx, "t10k-labels", 3)
    file = idx / "t10k-labels-idx1-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="is cut short"):
        fashion_mnist.read_idx(idx, "t10k-labels", 1)


def draw_forest(folder: Path, name: str, side: int, count: int) -> None:
    """A square photograph with trees of 14 pixels, and their boxes in Pascal VOC's XML."""
    picture = np.full((side, side, 3), (120, 130, 70), np.uint8)
    boxes = []
    for x, y in np.random.default_rng(side).integers(0, side - 14, (count, 2)):
        picture[y : y + 14, x : x + 14] = (20, 60, 30)
        corners = {"xmin": x, "ymin": y, "xmax": x + 14, "ymax": y + 14}
        inner = "".join(f"<{key}>{value}</{key}>" for key, value in corners.items())
        boxes.append(f"<object><name>Tree</name><bndbox>{inner}</bndbox></object>")
    Image.fromarray(picture).save(folder / f"{name}.png")
    (folder / f"{name}.xml").write_text(f"<annotation>{''.join(boxes)}</annotation>")


def test_trees(tmp_path, monkeypatch):
    torch.manual_seed(0)
    package = tmp_path / "deepforest-2.1.0-py3-none-any.whl"  # here the folder of its data
    package.mkdir()
    for split, side, count in (("train", 864, 120), ("val", 96, 5), ("test", 64, 2)):
        for name in trees.SPLITS[split]:
            draw_forest(package, name, side, count)
    small = ["--model", "test_resnet", "--batch-size", "1", "--epochs", "1", "--workers", "0"]
    small += ["train_dataloader.dataset.times=1"]
    run_page("trees", tmp_path, monkeypatch, *small)
    (words,) = re.findall(r"```text\n(.*?)```", (ROOT / "docs" / "trees.md").read_text(), re.DOTALL)
    file = tmp_path / "work_dirs" / "trees_rala_vit_tiny" / "config.py"
    cfg = load_config(file, words.split())
    pipeline = cfg.train_dataloader.dataset.dataset.pipeline
    assert [step.type for step in pipeline[3:5]] == ["RandomCrop", "PhotoMetricDistortion"]
    assert pipeline[5] == {
        "type": "RandomFlip",
        "prob": [0.25, 0.25, 0.25],
        "direction": ["horizontal", "vertical", "diagonal"],
    }
    # Once by the words above, in place of 256 times.
    assert cfg.train_dataloader.dataset.type == "RepeatDataset"
    assert cfg.train_dataloader.dataset.times == 1
    assert objects_of(41, 574, (2299, 2472)).repeats(640, images=1) == 256
    assert cfg.val_dataloader.dataset.pipeline[1].scale_factor == 1
    assert (cfg.model.test_cfg.max_per_img, cfg.model.test_cfg.nms_pre) == (200, 2000)
    assert cfg.model.bbox_head.anchor_generator.octave_base_scale == 14 / 8
    assert cfg.default_hooks.checkpoint.save_best == "coco/bbox_mAP_50"


def objects_of(side: float, count: int, size: tuple[int, int]) -> Objects:
    things = [{"bbox": [0, 0, side, side], "label": 0}] * count
    sample = Sample(Path("picture.png"), things, size)
    return Objects.of(Source("", "", "detection", ["tree"], {"train": [sample], "val": []}))


@pytest.mark.parametrize(
    ("side", "count", "size", "crop", "anchor", "kept"),
    [
        (41, 574, (2299, 2472), 640, 32.0, 900),  # trees
        (100, 7, (640, 480), None, 32.0, 100),  # COCO
        (20, 90, (640, 480), None, 32.0, 200),  # resizing enlarges them
        (16, 20, (1920, 1080), 256, 16.0, 100),
        (90, 20, (4000, 3000), 800, 32.0, 100),
    ],
)
def test_what_objects_ask_for(side, count, size, crop, anchor, kept):
    objects = objects_of(side, count, size)
    assert objects.crop(800) == crop
    seen = objects.sides if crop else objects.resized(800)
    assert (objects.anchor(seen), objects.kept) == (anchor, kept)


def test_images_without_objects():
    objects = objects_of(1, 0, (2000, 2000))
    assert (objects.crop(800), objects.anchor(objects.sides), objects.kept) == (None, 32.0, 100)


def test_an_epoch_of_crops_covers_the_images():
    objects = objects_of(16, 20, (8000, 8000))
    assert objects.repeats(256, images=1) == 977
    assert objects.repeats(256, images=1000) == 977
    assert objects_of(16, 20, (1000, 1000)).repeats(256, images=100) == 16
