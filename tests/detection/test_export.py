"""Detectors as files: what mmdet predicts, computed for a batch at once, and as a graph."""

import csv
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("mmdet", reason="mmdet is not installed: pip install linsight[det]")

import torch
import torchvision
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from PIL import Image
from typer.testing import CliRunner

from linsight.heads.deployment import suppress
from linsight.heads.deployment_detection import DeployedDetector
from linsight.tools import main
from linsight.tools.config import load_config
from linsight.tools.export import Format, write_file
from linsight.tools.export_check import EXACT, HALF, compare, match_objects
from linsight.tools.export_file import open_file
from linsight.tools.export_half import lower
from linsight.tools.export_subject import dense_subject, preparation_of
from linsight.tools.export_tensorrt import refusals
from linsight.tools.model import Run
from linsight.tools.predict_detection import DetectionPredictor

SMALL = ["model.backbone.depths=(1,0,0,1)"]
CONFIGS = {
    "retinanet": "retinanet_rala_vit_nano_fpn_digits",
    "mask_rcnn": "mask_rcnn_rala_vit_nano_fpn_digits",
    "cascade": "cascade_mask_rcnn_rala_vit_nano_fpn_digits",
    "dino": "dino_4scale_rala_vit_nano_digits",
}


def config_of(name: str, words: list[str] = SMALL):
    return load_config(CONFIGS[name], words)


def detector_of(name: str, words: list[str] = SMALL) -> torch.nn.Module:
    """A detector of random weights, so drawn that the objects of an image differ in score."""
    torch.manual_seed(0)
    detector = MODELS.build(config_of(name, words).model).eval()
    for key, weight in detector.named_parameters():
        if weight.ndim == 1 or any(word in key for word in ("_cls", "_reg", "sampling")):
            weight.data += (0.01 if "retina" in key else 0.03) * torch.randn(weight.shape)
        if key.endswith("retina_cls.weight"):
            weight.data /= 4  # so that the best scores are not all 1
    return detector


def images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def test_a_picture_is_resized_as_the_file_says():
    steps = [{"type": "LoadImageFromFile"}, {"type": "Resize", "scale": [96, 64]}]
    steps[1]["keep_ratio"] = True
    steps.append({"type": "PackDetInputs", "meta_keys": ["img_shape", "scale_factor"]})
    prepare = preparation_of({"task": "detection", "preparation": {"pipeline": steps}})
    pixels, scale = prepare(Image.new("RGB", (60, 40)))
    assert (pixels.shape, scale) == ((3, 64, 96), (1.6, 1.6))


class Suppression(torch.nn.Module):
    def forward(self, boxes, scores):
        return suppress(boxes, scores, 0.5, -0.5, 10)


def test_an_exported_suppression_keeps_none_one_or_many():
    boxes, batch = torch.rand(2, 20, 4), torch.export.Dim("batch", min=1, max=8)
    boxes[..., 2:] += boxes[..., :2]
    sizes = ({0: batch}, {0: batch})
    program = torch.export.export(Suppression(), (boxes, boxes[..., 0]), dynamic_shapes=sizes)
    for count in (0, 1, 2, 20):
        scores = torch.full((2, 20), -1.0)
        scores[1, :count] = torch.rand(count)
        kept = program.module()(boxes, scores)
        assert torch.equal(kept, suppress(boxes, scores, 0.5, -0.5, 10))
        alone = torchvision.ops.nms(boxes[1, :count], scores[1, :count], 0.5)
        assert kept.nonzero().tolist() == [[1, index] for index in sorted(alone.tolist())]


@pytest.mark.parametrize(
    "name",
    [
        "mask_rcnn",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("retinanet", "cascade", "dino")),
    ],
)
@torch.inference_mode()
def test_a_batch_is_what_mmdet_predicts_one_by_one(name):
    """Of images whose sides the stride does not divide, so that they are padded."""
    detector = detector_of(name)
    pixels = images(2, 3, 70, 101)
    meta = {"img_shape": (70, 101), "ori_shape": (70, 101), "scale_factor": (1.0, 1.0)}
    samples = [DetDataSample(metainfo=meta | {"img_id": i}) for i in range(2)]
    bgr = [image.flip(0) for image in pixels]
    wanted = detector.test_step({"inputs": bgr, "data_samples": samples})
    found = DeployedDetector(detector)(pixels)
    for i, sample in enumerate(wanted):
        objects = sample.pred_instances
        expected = {
            "boxes": objects.bboxes,
            "labels": objects.labels,
            "scores": objects.scores,
        } | ({"masks": torch.as_tensor(objects.masks)} if "masks" in objects else {})
        there = found["labels"][i] >= 0
        assert there.sum() == len(objects) > 0
        match = match_objects(expected, {key: value[i][there] for key, value in found.items()})
        assert match["objects"] == match["found"] > 0
        assert match["iou"] > 0.999
        assert match["score"] < 1e-4
        assert match["masks"] > 0.999


def test_an_image_without_objects_has_rows_of_nothing():
    detector = detector_of("mask_rcnn")
    detector.roi_head.test_cfg.score_thr = 1.0
    with torch.inference_mode():
        found = DeployedDetector(detector)(images(1, 3, 64, 64))
    assert (found["labels"] == -1).all()
    assert not any(found[name].any() for name in ("boxes", "scores", "masks"))


def test_faster_rcnn_has_boxes_alone():
    config = config_of("mask_rcnn")
    config.model.roi_head.update(mask_head=None, mask_roi_extractor=None)
    detector = MODELS.build(config.model).eval()
    with torch.inference_mode():
        found = DeployedDetector(detector)(images(1, 3, 64, 64))
    assert list(found) == ["boxes", "labels", "scores"]
    assert found["boxes"].shape == (1, 20, 4)


def test_what_no_graph_computes_is_refused_by_name():
    detector = detector_of("retinanet")
    detector.bbox_head.test_cfg.nms.type = "soft_nms"
    with pytest.raises(ValueError, match="suppressed by soft_nms, not by nms"):
        DeployedDetector(detector)


# The stem alone, whose map and a coarser one are searched: a quarter of the operators.
SMALLEST = [
    "model.backbone.depths=(0,0,0,0)",
    "model.backbone.out_indices=(0,)",
    "model.neck.num_outs=2",
    "model.rpn_head.anchor_generator.strides=[4,8]",
]


@pytest.fixture(scope="module")
def run():
    """The content of a checkpoint of Mask R-CNN."""
    detector = detector_of("mask_rcnn", SMALLEST)
    config = config_of("mask_rcnn", SMALLEST)
    return Run(config, tuple("0123456789"), detector.state_dict())


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    """Mask R-CNN as ONNX."""
    pytest.importorskip("onnxruntime")
    subject = dense_subject(run, "mask_rcnn", onnx=True).with_size((64, 96))
    return write_file(subject, tmp_path_factory.mktemp("onnx"), Format.onnx)


def test_mask_rcnn_as_onnx(written):
    """Suppression is ONNX's own operator, and objects and masks are those of the model."""
    onnx = pytest.importorskip("onnx")
    assert written.difference.values["objects"] > 10
    assert written.difference.values["share found again"] >= EXACT.objects
    assert written.difference.values["mean IoU of masks"] >= EXACT.objects
    model = onnx.load(written.path)
    assert [node.op_type for node in model.graph.node].count("NonMaxSuppression") == 2
    assert [output.name for output in model.graph.output] == ["boxes", "labels", "scores", "masks"]
    assert refusals(model) == []  # TensorRT takes it
    opened = open_file(written.path)
    assert opened.description["classes"] == list("0123456789")
    assert opened.sides == (64, 96)
    assert opened.run(images(3, 3, 64, 96))["masks"].shape == (3, 20, 64, 96)


def test_half_precision(run):
    """Scores and boxes stay in float32."""
    subject = dense_subject(run, "mask_rcnn", onnx=True)
    pixels = images(1, 3, 64, 96)
    lowered, wide = lower(subject, torch.float16, [pixels])
    assert wide == ()
    found = compare(subject.module, lowered.module, [pixels], HALF).values
    assert found["objects"] > 5
    assert 0 < found["largest difference of scores"] < 1e-2
    assert found["least IoU"] > 0.95
    with pytest.raises(ValueError, match=r"does not run in torch.bfloat16: .*roi_align"):
        lower(subject, torch.bfloat16, [pixels])
    dino = DeployedDetector(detector_of("dino"))
    with pytest.raises(ValueError, match="coordinates, which need --dtype float32"):
        lower(replace(subject, module=dino), torch.float16, [pixels])


@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_file_predicts_what_its_checkpoint_predicts(run, written, tmp_path, monkeypatch, alone):
    """Of a folder in which other files stand, too; a process of its own has to know mmdet's
    transforms."""
    picture = Image.fromarray(images(64, 96, 3).numpy())
    (tmp_path / "folder").mkdir()
    picture.save(tmp_path / "folder" / "noise.png")
    (tmp_path / "folder" / "notes.txt").write_text("no picture")
    words = ["predict", str(written.path), "folder", "--score", "0.01"]
    monkeypatch.chdir(tmp_path)
    if alone:
        command = [sys.executable, "-m", "linsight.tools.main", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr
    else:
        result = CliRunner().invoke(main.app, words)
        assert result.exit_code == 0, result.output
        assert "warning" not in result.output
    with open(tmp_path / "predictions" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["picture"] for row in rows} == {"folder/noise.png"}
    predictor = DetectionPredictor(run, "mask_rcnn", torch.device("cpu"), 0.01, False)
    wanted = predictor.predict(picture)
    found = {
        "boxes": [
            [float(row[side]) for side in ("left", "top", "right", "bottom")] for row in rows
        ],
        "labels": [int(row["class"]) for row in rows],
        "scores": [float(row["score"]) for row in rows],
    }
    expected = {key: torch.as_tensor(getattr(wanted, key)) for key in found}
    match = match_objects(expected, {key: torch.tensor(value) for key, value in found.items()})
    assert len(rows) == len(wanted.scores)
    assert match["objects"] == match["found"] > 5
    assert match["score"] < 1e-3


def test_a_traced_suppression_keeps_any_number_of_boxes():
    """None, one, and one of two that overlap."""

    class Suppress(torch.nn.Module):
        def forward(self, boxes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return suppress(boxes, scores, 0.5, 0.1, 10)

    boxes = torch.tensor([[[0.0, 0, 9, 9], [0, 0, 9, 8], [-9, 1, -2, 7]]] * 2)
    scores = torch.tensor([[0.2, 0.5, 0.0], [0.0, 0.0, 0.3]])
    run = torch.export.export(Suppress(), (boxes, scores)).module()
    wanted = torch.tensor([[False, True, False], [False, False, True]])
    for shares in ((0, 0), (1, 0), (0, 1), (1, 1)):
        share = torch.tensor(shares)[:, None]
        found = run(boxes, scores * share)
        assert found.tolist() == (wanted & (share > 0)).tolist()
