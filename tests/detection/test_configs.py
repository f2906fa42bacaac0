"""The detection configs: each names a model that builds, a data set and a schedule."""

import re

import pytest

pytest.importorskip("mmdet", reason="mmdet is not installed: pip install linsight[det]")

import mmdet
import timm
import torch
from mmdet.registry import MODELS

from linsight.backbones.initialization import shapes_only
from linsight.tools.config import CONFIGS, find_config, load_config

METHODS = {
    "mask_rcnn": "TimmMaskRCNN",
    "cascade_mask_rcnn": "TimmCascadeRCNN",
    "retinanet": "TimmRetinaNet",
    "dino": "TimmDINO",
}
FILES = sorted(file for method in METHODS for file in CONFIGS.glob(f"{method}/*.py"))
NAMES = [file.stem for file in FILES]
# Other configs differ from these only in the backbone's size.
RECIPES = [file.stem for file in FILES if "_base_ = [" in file.read_text()]
COCO = [name for name in NAMES if name.endswith("_coco")]
EPOCHS = {"1x": (12, [8, 11]), "3x": (36, [27, 33]), "12e": (12, [11])}


@pytest.mark.parametrize("name", NAMES)
def test_names_what_it_is_called(name):
    cfg = load_config(name)
    backbone = cfg.model.backbone
    assert backbone.model_name in name
    method = find_config(name).parent.name
    assert name.startswith(f"{method}_")
    assert cfg.model.type == METHODS[method]
    assert "in_channels" not in cfg.model.neck
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
    # Where everything decays, no parameter is excepted.
    assert ("paramwise_cfg" in cfg.optim_wrapper) == (decay == 0.05)


def test_what_does_not_decay():
    """The parameters that the papers except do not decay, under the models' names for them."""
    from mmengine.optim import build_optim_wrapper

    cfg = load_config("mask_rcnn_agent_swin_tiny_fpn_1x_coco")
    cfg.optim_wrapper.type = "OptimWrapper"
    del cfg.optim_wrapper.loss_scale, cfg.optim_wrapper.dtype
    with shapes_only():
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


def old_dino(name: str) -> bool:
    return name == "dino_4scale_rala_vit_nano_digits" and mmdet.__version__ == "3.3.0"


@pytest.mark.parametrize("name", RECIPES)
def test_builds(name):
    if old_dino(name):
        pytest.skip("mmdet 3.3.0's DINO is made for 256 channels alone")
    cfg = load_config(name, ["model.backbone.pretrained=False"])
    with shapes_only():
        model = MODELS.build(cfg.model)
        info = timm.create_model(cfg.model.backbone.model_name).feature_info
    levels = model.backbone.out_indices
    if cfg.model.neck.type == "SimpleFeaturePyramid":
        assert (levels, model.neck.in_stride) == ([11], 16)
        return
    convolutions = [part for part in model.neck.modules() if isinstance(part, torch.nn.Conv2d)]
    channels = [convolution.in_channels for convolution in convolutions[: len(levels)]]
    assert channels == [info[level]["num_chs"] for level in levels]


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("nano_fpn_digits")])
def test_maps_go_through_the_neck(name):
    cfg = load_config(name)
    model = MODELS.build(cfg.model)
    maps = model.neck(model.backbone(torch.zeros(1, 3, 64, 96)))
    assert {x.shape[1] for x in maps} == {cfg.model.neck.out_channels}


NANO = "retinanet_rala_vit_nano_fpn_digits"


class TestTheNecksChannels:
    def test_follow_the_model_and_its_levels(self):
        words = ["model.backbone.model_name=rala_vit_tiny", "model.backbone.out_indices=(1,2)"]
        cfg = load_config(NANO, [*words, "model.neck.num_outs=2"])
        assert MODELS.build(cfg.model).neck.in_channels == [128, 256]

    def test_are_those_of_the_config_where_it_has_them(self):
        cfg = load_config(NANO, ["model.neck.in_channels=[32,64,128,192]"])
        assert MODELS.build(cfg.model).neck.in_channels == [32, 64, 128, 192]
        cfg.model.type = "RetinaNet"
        assert MODELS.build(cfg.model).neck.in_channels == [32, 64, 128, 192]
        cfg.model.neck.in_channels = [32, 64, 128, 100]
        with pytest.raises(RuntimeError, match="192 channels"):
            MODELS.build(cfg.model).extract_feat(torch.zeros(1, 3, 64, 64))

    def test_a_wrong_model_is_named(self):
        cfg = load_config(NANO)
        cfg.model.backbone.model_name = "rala_vit_nan"
        with pytest.raises(ValueError, match="timm has no model 'rala_vit_nan'; the nearest are"):
            MODELS.build(cfg.model)

    def test_of_another_librarys_backbone_are_to_be_given(self):
        cfg = load_config(NANO)
        cfg.model.backbone = {"type": "ResNet", "depth": 18}
        with pytest.raises(TypeError, match="in_channels"):
            MODELS.build(cfg.model)


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
