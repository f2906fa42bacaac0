"""`linsight train`, `test` and `predict` on detectors, on trainings of a few images."""

import csv
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("mmdet", reason="mmdet is not installed: pip install linsight[det]")

import cv2
import mmdet
import torch
from PIL import Image

from linsight.data.digits import digit_scene
from linsight.data.digits_coco import write_coco
from linsight.tools.benchmark import benchmark
from linsight.tools.config import find_config
from linsight.tools.predict import predict

from ..tools.test_train import cli_test, cli_train, command

cli_predict = command(predict)
MASK_RCNN = "mask_rcnn_rala_vit_nano_fpn_digits"
# An epoch has four images, a validation two.
SMALL = [
    "--cfg-options",
    "train_cfg.val_interval=1",
    "train_cfg.max_epochs=2",
    "train_dataloader.num_workers=0",
    "train_dataloader.batch_size=2",
    "train_dataloader.sampler.selected_round=2",
    "train_dataloader.dataset.length=40",
    *(f"{split}_dataloader.{word}" for split in ("val", "test") for word in (
        "num_workers=0", "batch_size=2", "dataset.length=2"
    )),
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The work dir of a finished training of a Mask R-CNN."""
    folder = tmp_path_factory.mktemp("trained")
    output = cli_train(MASK_RCNN, "--work-dir", folder / "run", *SMALL)
    (folder / "output.txt").write_text(output)
    return folder / "run"


def test_mmdet_is_quiet():
    """In a fresh process, because it is imported once, it says nothing of optional packages."""
    code = f"from linsight.tools.config import load_config; load_config({MASK_RCNN!r})"
    # OpenMMLab's own mmengine, in place of its fork, imports what setuptools warns of.
    environment = {**os.environ, "PYTHONWARNINGS": "ignore:pkg_resources is deprecated"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    # torch warns of torchao, which mmengine imports through transformers where both are there.
    said = [line for line in done.stderr.splitlines() if "torch/utils/_pytree.py" not in line]
    assert [*done.stdout.splitlines(), *said] == []


def scene(index: int) -> np.ndarray:
    return digit_scene(index, "test", size=(64, 81), digits=2, digit_size=(0.4, 0.6)).image


class TestMaskRCNN:
    def test_leaves_weights_figures_and_metrics(self, trained):
        assert {p.name for p in trained.glob("epoch_*")} == {"epoch_1.pth", "epoch_2.pth"}
        assert list(trained.glob("best_coco_bbox_mAP_epoch_*.pth"))
        for figure in ("learning_curve.png", "predictions.png"):
            with Image.open(trained / figure) as picture:
                assert min(picture.size) > 300
        output = (trained.parent / "output.txt").read_text()
        assert "loss_mask" in output
        assert "coco/bbox_mAP: " in output
        assert "Average Precision" not in output

    def test_resumes(self, trained, tmp_path):
        shutil.copytree(trained, tmp_path / "run")
        words = [*SMALL, "train_cfg.max_epochs=3"]
        output = cli_train(MASK_RCNN, "--work-dir", tmp_path / "run", "--resume", *words)
        assert "resumed epoch: 2" in output
        assert (tmp_path / "run" / "epoch_3.pth").is_file()

    def test_prints_box_and_mask_precision(self, trained, tmp_path):
        output = cli_test(MASK_RCNN, trained / "epoch_2.pth", "--work-dir", tmp_path, *SMALL)
        rows = [line.split()[1] for line in output.splitlines() if line.startswith("│")]
        assert {"bbox_mAP", "bbox_mAP_50", "segm_mAP"} <= set(rows)
        assert (tmp_path / "predictions.png").is_file()

    def test_other_classes_are_refused_or_left_out(self, trained, tmp_path):
        words = [*SMALL, "model.roi_head.bbox_head.num_classes=12"]
        source = trained / "epoch_2.pth"
        output = cli_test(MASK_RCNN, source, "--work-dir", tmp_path, *words, expect=1)
        assert "(roi_head.bbox_head.fc_cls.weight is (11, 128), the model's (13, 128))" in output
        words += [f"load_from={source}", "train_cfg.max_epochs=1", "train_cfg.val_begin=9"]
        words += ["default_hooks.predictions=None", "default_hooks.data_check=None"]
        output = cli_train(MASK_RCNN, "--work-dir", tmp_path, *words)
        assert "2 weights of its heads are left out" in output

    def test_no_tta_with_masks(self, trained, tmp_path):
        source = trained / "epoch_2.pth"
        words = ["--tta", "--work-dir", tmp_path, *SMALL]
        output = cli_test(MASK_RCNN, source, *words, expect=1)
        assert "--tta: the config has no tta_model" in output

    def test_predicts_pictures_and_videos(self, trained, tmp_path):
        Image.fromarray(scene(0)).save(tmp_path / "still.png")
        (tmp_path / "broken.mp4").write_bytes(b"no video")
        clip = tmp_path / "clip.avi"
        writer = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*"MJPG"), 5, (80, 64))
        for index in range(3):
            writer.write(np.ascontiguousarray(scene(index)[:, :80, ::-1]))
        writer.release()
        out = tmp_path / "out"
        words = ["--out", out, "--score", 0, "--device", "cpu"]
        output = cli_predict(trained / "epoch_2.pth", tmp_path, *words)
        assert "1 of 3 pictures could not be read" in output
        assert "3 frames" in output
        assert {p.name for p in out.iterdir()} == {"still.png", "clip.mp4", "predictions.csv"}
        with open(out / "predictions.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert set(rows[0]) == {
            *("picture", "class", "score", "left", "top", "right", "bottom", "mask_pixels")
        }
        assert {row["picture"].split("/")[-1] for row in rows} == {
            *("still.png", "clip.avi#0", "clip.avi#1", "clip.avi#2")
        }
        assert {row["class"] for row in rows} <= set("0123456789")
        video = cv2.VideoCapture(str(out / "clip.mp4"))
        assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 3
        assert video.get(cv2.CAP_PROP_FPS) == 5

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("type='CocoMetric'", "type=print('code ran')", "not plain data"),
            ("type='FPN'", "type='os.system'", "names os.system"),
        ],
    )
    def test_a_checkpoint_runs_no_code(self, trained, tmp_path, old, new, message):
        content = torch.load(trained / "epoch_2.pth", weights_only=False)
        text = content["meta"]["cfg"]
        old = old if old in text else "type='QuietCocoMetric'"
        content["meta"]["cfg"] = text.replace(old, new)
        torch.save(content, tmp_path / "hostile.pth")
        Image.fromarray(scene(0)).save(tmp_path / "still.png")
        words = ["--out", tmp_path / "out"]
        output = cli_predict(tmp_path / "hostile.pth", tmp_path / "still.png", *words, expect=1)
        assert message in output
        assert "code ran\n" not in output


COCO = """
_base_ = "{base}"
data_root = "{root}/"
classes = dict(classes=tuple("0123456789"))
model = dict(
    backbone=dict(model_name="rala_vit_nano", pretrained=False),
    neck=dict(in_channels=[64, 128, 192], out_channels=32),
    bbox_head=dict(num_classes=10, in_channels=32, feat_channels=32),
)
train_dataloader = dict(num_workers=0, dataset=dict(data_root=data_root, metainfo=classes))
val_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root, metainfo=classes)
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
"""


def test_own_data_in_cocos_folders(tmp_path):
    """RetinaNet's recipe runs on a folder like COCO's with other classes, and with --tta."""
    root = tmp_path / "coco"
    made = write_coco(tmp_path / "digits", train=4, test=2, size=96, digits=2)
    (root / "annotations").mkdir(parents=True)
    for split, name in (("train", "train2017"), ("test", "val2017")):
        (made / "images" / split).rename(root / name)
        (made / f"instances_{split}.json").rename(root / "annotations" / f"instances_{name}.json")
    config = tmp_path / "mine.py"
    base = find_config("retinanet_rala_vit_tiny_fpn_1x_coco")
    config.write_text(COCO.format(base=base, root=root))
    words = ["--work-dir", tmp_path / "run", "--cfg-options"]
    words += ["train_dataloader.dataset.pipeline.2.scale=(96,96)"]
    words += [f"{s}_dataloader.dataset.pipeline.1.scale=(96,96)" for s in ("val", "test")]
    words += [
        f"tta_pipeline.1.transforms.0.{i}.scale=({s},{s})" for i, s in enumerate((96, 64, 128))
    ]
    output = cli_train(config, *words)
    assert "coco/bbox_mAP" in output
    output = cli_test(config, tmp_path / "run" / "epoch_1.pth", "--tta", *words)
    assert "bbox_mAP" in output
    still = next((root / "val2017").iterdir())
    words = ["--tta", "--out", tmp_path / "out", "--device", "cpu"]
    assert "still" not in cli_predict(tmp_path / "run" / "epoch_1.pth", still, *words)


@pytest.mark.parametrize(
    "name",
    [
        "retinanet_rala_vit_nano_fpn_digits",
        pytest.param("cascade_mask_rcnn_rala_vit_nano_fpn_digits", marks=pytest.mark.slow),
        "dino_4scale_rala_vit_nano_digits",
    ],
)
def test_digits_twins_train(name, tmp_path):
    if name.startswith("dino") and mmdet.__version__ == "3.3.0":
        pytest.skip("mmdet 3.3.0's DINO is made for 256 channels alone")
    output = cli_train(name, "--work-dir", tmp_path, *SMALL, "train_cfg.max_epochs=1")
    assert "coco/bbox_mAP" in output
    assert ("coco/segm_mAP" in output) == ("mask" in name)


def test_benchmark_beside_another_backbone(tmp_path):
    words = ["detectors", MASK_RCNN, "--peer", "resnet10t", "--resolutions", "64", "--batch", "1"]
    words += ["--device", "cpu", "--seconds", "0.001", "--out", tmp_path]
    assert "Results" in command(benchmark)(*words)
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [("MaskRCNN rala_vit_nano", ""), ("MaskRCNN resnet10t", "MaskRCNN rala_vit_nano")]
    assert [(row["name"], row["peer_of"]) for row in rows] == names * 2
    assert {row["phase"] for row in rows} == {"inference", "training"}
    for row in rows:
        assert row["check"] == "ok"
        assert row["shape"] == "1 x 3 x 64 x 107"
        assert float(row["images_per_second"]) > 0
