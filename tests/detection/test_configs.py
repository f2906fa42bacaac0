"""The detection configs: each names a model that builds, a data set and a schedule."""

import re
from functools import cache

import pytest

pytest.importorskip("mmdet", reason="mmdet is not installed: pip install linsight[det]")

import mmdet
import timm
import torch
from mmdet.registry import MODELS

from linsight.tools.config import CONFIGS, load_config

NAMES = sorted(path.stem for path in CONFIGS.glob("detection/*.py"))
COCO = [name for name in NAMES if name.endswith("_coco")]
EPOCHS = {"1x": (12, [8, 11]), "3x": (36, [27, 33]), "12e": (12, [11])}


@cache
def channels(model_name: str) -> list[int]:
    with torch.device("meta"):
        return [level["num_chs"] for level in timm.create_model(model_name).feature_info]


@pytest.mark.parametrize("name", NAMES)
def test_names_what_it_is_called(name):
    cfg = load_config(name)
    backbone = cfg.model.backbone
    assert backbone.model_name in name
    detector = {"mask_rcnn": "MaskRCNN", "cascade_mask_rcnn": "CascadeRCNN"}
    detector |= {"retinanet": "RetinaNet", "dino_4scale": "DINO"}
    assert cfg.model.type == detector[name.partition(f"_{backbone.model_name}")[0]]
    levels = backbone.get("out_indices", (0, 1, 2, 3))
    found = channels(backbone.model_name)
    assert list(cfg.model.neck.in_channels) == [found[level] for level in levels]
    # A map that the neck leaves out has a norm without a gradient, at which DDP stops.
    assert cfg.model.neck.get("start_level", 0) == 0
    masks = "mask_rcnn" in name
    assert ("segm" in cfg.val_evaluator.metric) == masks
    if "digits" in name:
        assert cfg.train_dataloader.dataset.type == "DigitDetection"
        return
    epochs, milestones = EPOCHS[name.split("_")[-2]]
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[-1].end == epochs
    assert cfg.param_scheduler[-1].milestones == milestones
    assert backbone.pretrained
    loading = cfg.train_dataloader.dataset.pipeline[1]
    assert loading.get("with_mask", False) == masks
    assert cfg.train_dataloader.batch_size in (1, 2)


@pytest.mark.parametrize(
    ("name", "rate", "decay", "batch", "drop_path"),
    [
        ("retinanet_rala_vit_base_fpn_1x", 1e-4, 1e-4, 16, 0.4),
        ("mask_rcnn_rala_vit_tiny_fpn_1x", 1e-4, 0.05, 16, 0.1),
        ("cascade_mask_rcnn_rala_vit_large_fpn_3x", 1e-4, 0.05, 16, 0.55),
        ("retinanet_mala_vit_tiny_fpn_1x", 4e-4, 1e-4, 64, 0.1),
        ("mask_rcnn_mala_vit_large_fpn_3x", 2e-4, 0.05, 32, 0.55),
        ("retinanet_agent_pvt_large_fpn_1x", 1e-4, 1e-4, 16, 0.3),
        ("mask_rcnn_agent_pvt_small_fpn_1x", 2e-4, 1e-4, 16, 0.2),
        ("cascade_mask_rcnn_agent_swin_base_fpn_3x", 1e-4, 0.05, 16, 0.4),
        ("mask_rcnn_softmax_swin_tiny_fpn_3x", 1e-4, 0.05, 16, 0.2),
    ],
)
def test_recipes(name, rate, decay, batch, drop_path):
    cfg = load_config(f"{name}_coco")
    adamw = {"type": "AdamW", "fused": True}
    assert cfg.optim_wrapper.optimizer == {**adamw, "lr": rate, "weight_decay": decay}
    assert cfg.auto_scale_lr == {"enable": True, "base_batch_size": batch}
    assert cfg.model.backbone.drop_path_rate == drop_path
    # Where everything decays, nothing is excepted.
    assert ("paramwise_cfg" in cfg.optim_wrapper) == (decay == 0.05)


def test_what_does_not_decay():
    """By the names of the parameters that the papers except, as our models call them."""
    from mmengine.optim import build_optim_wrapper

    cfg = load_config("mask_rcnn_agent_swin_tiny_fpn_1x_coco")
    cfg.optim_wrapper.type = "OptimWrapper"
    del cfg.optim_wrapper.loss_scale
    with torch.device("meta"):
        model = torch.nn.ModuleDict({"backbone": timm.create_model("agent_swin_tiny")})
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    names = {id(p): name for name, p in model.named_parameters()}
    kept = {
        names[id(p)]
        for g in wrapper.optimizer.param_groups
        if not g["weight_decay"]
        for p in g["params"]
    }
    excepted = "norm|relative_position_bias_table|map_bias|row_bias|column_bias"
    assert kept == {name for name in names.values() if re.search(excepted, name)}


@pytest.mark.parametrize(
    "name",
    [
        "retinanet_rala_vit_nano_fpn_digits",
        "mask_rcnn_rala_vit_nano_fpn_digits",
        "cascade_mask_rcnn_rala_vit_nano_fpn_digits",
        "dino_4scale_rala_vit_nano_digits",
        "mask_rcnn_agent_pvt_tiny_fpn_1x_coco",
        "cascade_mask_rcnn_softmax_swin_tiny_fpn_3x_coco",
    ],
)
def test_builds(name):
    if name == "dino_4scale_rala_vit_nano_digits" and mmdet.__version__ == "3.3.0":
        pytest.skip("mmdet 3.3.0's DINO is made for 256 channels alone")
    cfg = load_config(name, ["model.backbone.pretrained=False"])
    model = MODELS.build(cfg.model)
    maps = model.neck(model.backbone(torch.zeros(1, 3, 64, 96)))
    assert {x.shape[1] for x in maps} == {cfg.model.neck.out_channels}


def test_data_root_moves_every_path():
    cfg = load_config(COCO[0], ["data_root=/my/coco"])
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.data_root == "/my/coco/"
    assert cfg.val_evaluator.ann_file == "/my/coco/annotations/instances_val2017.json"
    assert cfg.test_evaluator.ann_file == cfg.val_evaluator.ann_file
    assert "data/coco" not in cfg.pretty_text.replace("/my/coco", "")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.roi_head.mask_head.num_conv=3", "FCNMaskHead takes no 'num_conv'.*num_convs"),
        ("model.backbone.model_name=rala_vit_tiy", "timm has no model .*rala_vit_tiny"),
        ("val_evaluator.type=CocoMetrics", "nothing is registered as .*CocoMetric"),
    ],
)
def test_misspelt_override(override, message):
    from linsight.tools.config import ConfigError

    with pytest.raises(ConfigError, match=message):
        load_config("mask_rcnn_rala_vit_tiny_fpn_1x_coco", [override])
