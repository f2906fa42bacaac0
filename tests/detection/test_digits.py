"""Digit scenes for mmdet: their metric, their drawing, and the optimiser of detectors."""

import numpy as np
import pytest

pytest.importorskip("mmdet", reason="mmdet is not installed: pip install linsight[det]")

import torch
from mmdet.evaluation import CocoMetric
from mmdet.structures import DetDataSample
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.structures import InstanceData
from torch import nn

from linsight.data.digits import DETECTION, digit_scene
from linsight.data.digits_detection import DigitDetection
from linsight.heads.detection_figures import ObjectsFigureHook, class_colour, draw_objects
from linsight.heads.detection_metric import QuietCocoMetric

KEYS = ("img_id", "ori_shape", "img_shape", "scale_factor", "instances")
PIPELINE = [{"type": "PackDetInputs", "meta_keys": KEYS}]
SCENE = {"size": (96, 128), "digits": (0, 4), "max_overlap": 0.3}


@pytest.fixture
def scenes():
    return DigitDetection("test", 4, PIPELINE, **SCENE)


def perfect(item: dict) -> DetDataSample:
    """The item's objects, as a detector that finds all of them would predict them."""
    sample, truth = item["data_samples"], item["data_samples"].gt_instances
    sample.pred_instances = InstanceData(
        bboxes=truth.bboxes.tensor,
        labels=truth.labels,
        scores=torch.linspace(1, 0.6, len(truth)),
        masks=torch.from_numpy(truth.masks.masks).bool(),
    )
    return sample


def test_items_are_the_scenes(scenes):
    for index in range(len(scenes)):
        item, scene = scenes[index], digit_scene(index, "test", **{**DETECTION, **SCENE})
        image = item["inputs"].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(image[..., ::-1], scene.image)
        truth = item["data_samples"].gt_instances
        np.testing.assert_array_equal(truth.bboxes.tensor, scene.boxes)
        np.testing.assert_array_equal(truth.labels, scene.labels)
        np.testing.assert_array_equal(truth.masks.masks, scene.masks)
    with pytest.raises(IndexError, match="4 is out of range"):
        scenes[4]
    with pytest.raises(ValueError, match="length must be 1 or more, got 0"):
        DigitDetection("test", 0, PIPELINE)


def test_metric_without_an_annotation_file(scenes, capsys):
    metric = QuietCocoMetric(metric=["bbox", "segm"])
    metric.dataset_meta = scenes.metainfo
    for nothing_found in (False, True):
        samples = [perfect(scenes[index]) for index in range(4)]
        if nothing_found:
            for sample in samples:
                sample.pred_instances = sample.pred_instances[:0]
        metric.process({}, [sample.to_dict() for sample in samples])
        values = metric.evaluate(4)
        for kind in ("bbox", "segm"):
            assert values[f"coco/{kind}_mAP"] == pytest.approx(float(not nothing_found))
    assert "Average Precision" not in capsys.readouterr().out


def test_figures_of_faster_coco_eval(scenes):
    """They are pycocotools', per class, per size and per threshold."""
    faster = pytest.importorskip("faster_coco_eval", reason="it is not installed")
    assert any("Faster" in kind.__name__ for kind in QuietCocoMetric.__mro__)
    generator = torch.Generator().manual_seed(0)
    values = []
    samples = [perfect(scenes[index]) for index in range(4)]
    for sample in samples:
        found = sample.pred_instances
        found.bboxes = found.bboxes + 1.5 * torch.randn(found.bboxes.shape, generator=generator)
        found.scores = torch.rand(len(found), generator=generator)
        found.masks = found.masks.roll(1, -1)
        found.labels = (found.labels + (torch.arange(len(found)) % 3 == 2)) % 10
    for kind in (CocoMetric, QuietCocoMetric):
        metric = kind(metric=["bbox", "segm"], classwise=True)
        metric.dataset_meta = scenes.metainfo
        metric.process({}, [sample.to_dict() for sample in samples])
        values.append(metric.evaluate(4))
    assert type(metric._coco_api).__module__.startswith(faster.__name__)
    assert 0.1 < values[0]["coco/bbox_mAP"] < 0.9
    assert 0.1 < values[0]["coco/segm_mAP"] < 0.9
    assert values[0].keys() == values[1].keys()
    np.testing.assert_equal(values[1], values[0])


def test_objects_are_drawn_in_their_colours():
    image = np.full((200, 400, 3), 255, np.uint8)
    masks = np.zeros((2, 200, 400), bool)
    masks[0, 120:150, 60:90] = masks[1, 130:140, 300:380] = True
    boxes = np.array([[50.0, 100, 100, 160], [290, 110, 390, 150]])
    picture = draw_objects(image, boxes, np.array([3, 4]), np.array([0.9, 0.4]), masks)
    pixels = np.asarray(picture)
    assert picture.size == (400, 200)
    assert (image == 255).all()
    for label, (x, y), inside in ((3, (50, 130), (75, 135)), (4, (290, 130), (340, 135))):
        colour = np.array(class_colour(label))
        assert pixels[y, x].tolist() == colour.tolist()
        assert abs(pixels[inside[1], inside[0]] - (255 + colour) / 2).max() <= 1
    assert pixels[10, 200].tolist() == [255, 255, 255]
    # A small picture is drawn larger, a picture without objects at its own size.
    small = draw_objects(image[:64, :64], boxes[:0], np.zeros(0, int))
    assert small.size == (384, 384)
    assert (np.asarray(small) == 255).all()


def test_names_are_written_in_other_letters_than_ascii():
    image, box = np.zeros((200, 400, 3), np.uint8), np.array([[50.0, 100, 100, 160]])
    drawn = [draw_objects(image, box, np.array([0]), names=[name]) for name in "üéж"]
    # A letter that the font lacks is drawn as a box.
    assert len({picture.tobytes() for picture in drawn}) == 3


def test_figure_of_what_was_found(scenes):
    hook = ObjectsFigureHook(rows=2, columns=2, score_threshold=0.7)
    hook.reset()
    assert hook.figure({}) is None
    items = [scenes[index] for index in range(4)]
    hook.keep({"inputs": [item["inputs"] for item in items]}, [perfect(item) for item in items])
    hook.keep({"inputs": [items[0]["inputs"]]}, [perfect(items[0])])
    assert len(hook.kept) == 4
    for item, (_, annotated, found) in zip(items, hook.kept, strict=True):
        assert (found["scores"] >= 0.7).all()
        truth = item["data_samples"].gt_instances
        assert annotated["boxes"].shape == (len(truth), 4)
        assert annotated["labels"].tolist() == truth.labels.tolist()
    # Each image as annotated, and as found.
    assert len(hook.figure(scenes.metainfo).axes) == 8


class Parts(nn.Module):
    """A backbone whose table does not decay, and a head."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(3, 4)
        self.backbone.table = nn.Parameter(torch.zeros(2, 2))
        self.backbone.no_weight_decay = lambda: {"table"}
        self.head = nn.Linear(4, 5)


def test_timms_optimiser_takes_whole_detectors():
    settings = {"opt": "nmuon", "lr": 0.1, "weight_decay": 0.05}
    build = OPTIM_WRAPPER_CONSTRUCTORS.get("TimmOptimWrapperConstructor")
    model = Parts()
    names = {id(p): name for name, p in model.named_parameters()}
    wrapper = build({"optimizer": settings})(model)
    decay = {
        names[id(p)]: group["weight_decay"]
        for group in wrapper.optimizer.param_groups
        for p in group["params"]
    }
    assert decay == {
        "backbone.weight": 0.05,
        "head.weight": 0.05,
        "backbone.bias": 0,
        "head.bias": 0,
        "backbone.table": 0,
    }
    with pytest.raises(ValueError, match=r"layer_decay orders .* other parameters: head\.weight"):
        build({"optimizer": {**settings, "layer_decay": 0.7}})(model)
