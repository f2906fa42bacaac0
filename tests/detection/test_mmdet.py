"""mmdet, as pip installs it, on the operator table: its models build, train and predict."""

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import linsight.heads  # noqa: F401  before mmdet: provides mmcv's operators

pytest.importorskip("mmdet", reason="mmdet is not installed: pip install linsight[det]")

from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.structures import InstanceData

from .conftest import write_config

# Files of mmdet whose detectors are built on one of linsight's backbones.
DETECTORS = {
    "retinanet": "retinanet/retinanet_r50_fpn_1x_coco.py",
    "faster_rcnn": "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "mask_rcnn": "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "cascade_mask_rcnn": "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py",
    "mask2former": "mask2former/mask2former_r50_8xb2-lsj-50e_coco.py",
    "deformable_detr": "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
    "dino": "dino/dino-4scale_r50_8xb2-12e_coco.py",
    "rtmdet": "rtmdet/rtmdet_tiny_8xb32-300e_coco.py",
    "rtmdet_ins": "rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py",
}
# One file for each operator that the files above do without, on mmdet's own backbone.
OPERATORS = {
    "deformable_convolution": "dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py",
    "modulated_deformable_convolution": "dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py",
    "deformable_pooling": "dcn/faster-rcnn_r50_fpn_dpool_1x_coco.py",
    "masked_convolution": "guided_anchoring/ga-retinanet_r50-caffe_fpn_1x_coco.py",
    "carafe": "carafe/faster-rcnn_r50_fpn-carafe_1x_coco.py",
    "nms_match": "pisa/faster-rcnn_r50_fpn_pisa_1x_coco.py",
}
HEIGHT, WIDTH = 64, 96
BOXES = torch.tensor([[5.0, 5, 30, 40], [40, 10, 80, 60]])


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register_all_modules(init_default_scope=False)


def test_every_model_module_imports():
    import mmdet.models

    for module in pkgutil.walk_packages(mmdet.models.__path__, "mmdet.models."):
        importlib.import_module(module.name)


def config(file: str) -> ConfigDict:
    """The model of one of mmdet's files, with few queries and layers, and nothing to download."""
    root = Path(importlib.import_module("mmdet").__file__).parent / ".mim" / "configs"
    model = Config.fromfile(root / file).model

    def visit(node: object) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("init_cfg"), dict) and "checkpoint" in node["init_cfg"]:
                node["init_cfg"] = None
            for name in node.keys() & {"num_queries", "max_per_image", "max_per_img", "nms_pre"}:
                node[name] = min(node[name], 20)
            if "num_layers" in node and "layer_cfg" in node:
                node["num_layers"] = min(node["num_layers"], 2)
            if "num_points" in node and "oversample_ratio" in node:
                node["num_points"] = 128
        if isinstance(node, (dict, list, tuple)):
            for child in node.values() if isinstance(node, dict) else node:
                visit(child)

    visit(model)
    # Mask2Former's augmentation would make every image 1024 pixels wide and high.
    model.data_preprocessor.pop("batch_augments", None)
    return model


def on_small_resnet(model: ConfigDict) -> ConfigDict:
    # A deformable convolution is a part of a bottleneck, and a ResNet-18 has no bottlenecks.
    if "dcn" not in model.backbone:
        model.backbone.depth = 18
        model.neck.in_channels = [channels // 4 for channels in model.neck.in_channels]
    return model


def on_our_backbone(model: ConfigDict) -> ConfigDict:
    """The model with a `TimmBackbone` in place of its own, which gives as many maps."""
    where, key = model, "neck"
    if "neck" not in model:  # Mask2Former's neck is in its head.
        where, key = model, "panoptic_head"
    # An FPN that starts higher leaves the first map, and so its norm, without a gradient.
    first = where[key].get("start_level", 0)
    wanted = len(where[key].in_channels) - first
    if first:
        where[key].start_level = 0
    model.backbone = {
        "type": "TimmBackbone",
        "model_name": "rala_vit_nano",
        "out_indices": tuple(range(4 - wanted, 4)),
        "output_norm_eps": 1e-6,
    }
    where[key].in_channels = MODELS.build(model.backbone).out_channels
    if key == "panoptic_head":
        where[key].strides = [4, 8, 16, 32]
    return model


def sample(objects: int, masked: bool) -> DetDataSample:
    size = (HEIGHT, WIDTH)
    info = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), size)
    sample = DetDataSample(metainfo=info | {"scale_factor": (1.0, 1.0), "img_id": objects})
    sample.gt_instances = InstanceData(
        bboxes=BOXES[:objects],
        labels=torch.tensor([1, 3])[:objects],
    )
    if masked:
        masks = np.zeros((objects, *size), np.uint8)
        for mask, (left, top, right, bottom) in zip(masks, BOXES.int().tolist(), strict=False):
            mask[top:bottom, left:right] = 1
        sample.gt_instances.masks = BitmapMasks(masks, *size)
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))
    return sample


def step_and_predict(model: torch.nn.Module, masked: bool) -> None:
    """One backward pass and one prediction, for one image with two objects and one without any."""
    images = torch.randint(0, 255, (2, 3, HEIGHT, WIDTH), dtype=torch.uint8)

    model.init_weights()  # Without it, some of mmdet's parameters are whatever memory held.
    model.train()
    batch = {"inputs": list(images), "data_samples": [sample(2, masked), sample(0, masked)]}
    losses = model(**model.data_preprocessor(batch, training=True), mode="loss")
    total, _ = model.parse_losses(losses)
    total.backward()
    assert total.isfinite()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
    # DDP stops at a parameter without a gradient.
    assert {name for name, p in model.named_parameters() if p.requires_grad} <= gradients.keys()
    assert any(gradients[name].any() for name in gradients if name.startswith("backbone."))

    model.eval()
    batch = {"inputs": list(images[:1]), "data_samples": [sample(2, masked)]}
    with torch.no_grad():
        (found,) = model(**model.data_preprocessor(batch), mode="predict")
    instances = found.pred_instances
    assert instances.bboxes.shape == (len(instances), 4)
    assert instances.scores.isfinite().all()


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_in_mmdets_own_models(name):
    torch.manual_seed(0)
    step_and_predict(MODELS.build(on_small_resnet(config(OPERATORS[name]))), masked=False)


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_on_our_backbone(name):
    torch.manual_seed(0)
    masked = "mask" in name or name == "rtmdet_ins"
    step_and_predict(MODELS.build(on_our_backbone(config(DETECTORS[name]))), masked)


@pytest.mark.parametrize(
    "imports",
    [pytest.param("linsight.heads", marks=pytest.mark.slow), "linsight.kernels.mmcv_operators"],
)
def test_mmdets_own_script_trains(tmp_path, imports):
    """One import in the config is enough, for workers, too."""
    text = write_config(tmp_path, epochs=1).read_text()
    text = re.sub(r"custom_imports = .*?\n\)\n", "", text, flags=re.DOTALL)
    text = text.replace("CheckedCocoDataset", "CocoDataset").replace(
        "num_workers=0", "num_workers=1"
    )
    if imports == "linsight.heads":
        text += 'runner_type = "SafeRunner"\n'
    else:
        # The detector is mmdet's alone.
        text = re.sub(r"default_hooks = .*", "", text, flags=re.DOTALL)
        text += """
model["backbone"] = dict(type="ResNet", depth=18, out_indices=(1, 2))
model["neck"]["in_channels"] = [128, 256]
"""
    config = tmp_path / "plain.py"
    config.write_text(f"custom_imports = dict(imports=[{imports!r}])\n{text}")
    script = Path(importlib.import_module("mmdet").__file__).parent / ".mim" / "tools" / "train.py"
    done = subprocess.run(
        [sys.executable, str(script), str(config), "--work-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "epoch_1.pth").is_file()
