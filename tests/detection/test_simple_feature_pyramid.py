"""The pyramid of plain bodies, in detectors, in segmentors and by itself."""

import pytest

pytest.importorskip("mmdet", reason="mmdet is not installed: pip install linsight[det]")

import torch
from mmdet.registry import MODELS

from linsight.heads.segmentation import SemanticSegmentor
from linsight.heads.simple_feature_pyramid import SimpleFeaturePyramid
from linsight.tools.config import load_config

from .test_mmdet import step_and_predict

PLAIN = {"embed_dim": 32, "depth": 2, "num_heads": 2, "pretrained": False}


@pytest.mark.parametrize(("patch", "side"), [(16, 14), (14, 16)])
def test_strides(patch, side):
    """Maps have the strides that they say, whatever the patch."""
    pyramid = SimpleFeaturePyramid([32], 8, in_stride=patch)
    maps = pyramid([torch.randn(1, 32, side, side)])
    assert [tuple(x.shape[1:]) for x in maps] == [(8, s, s) for s in (56, 28, 14, 7, 4)]
    assert pyramid.strides == (4, 8, 16, 32, 64)
    assert pyramid.out_channels == [8] * 5
    (coarse,) = SimpleFeaturePyramid([32], 8, strides=(32,))([torch.randn(1, 32, 1, 1)])
    assert coarse.shape == (1, 8, 1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": [8, 8]}, "takes one map, and the backbone gives 2"),
        ({"in_channels": [8], "strides": (4, 16)}, r"strides are \(4, 16\)"),
        ({"in_channels": [8], "strides": (64, 128)}, r"strides are \(64, 128\)"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        SimpleFeaturePyramid(**options)


def mask_rcnn():
    cfg = load_config("mask_rcnn_agent_deit_tiny_sfp_1x_coco")
    model = cfg.model
    model.backbone.update(PLAIN)
    model.neck.out_channels = model.rpn_head.in_channels = model.rpn_head.feat_channels = 16
    for extractor in (model.roi_head.bbox_roi_extractor, model.roi_head.mask_roi_extractor):
        extractor.out_channels = 16
    model.roi_head.bbox_head.update(in_channels=16, fc_out_channels=32)
    model.roi_head.mask_head.update(in_channels=16, conv_out_channels=16)
    return model


def test_a_detector_trains_and_predicts():
    torch.manual_seed(0)
    step_and_predict(MODELS.build(mask_rcnn()), masked=True)


def test_an_fpn_on_a_plain_body_is_refused():
    model = mask_rcnn()
    model.neck = {"type": "FPN", "out_channels": 16, "num_outs": 5}
    with pytest.raises(ValueError, match="agent_deit_tiny has maps of the stride 16 alone"):
        MODELS.build(model)


@pytest.mark.parametrize("head", ["FPNHead", "UPerHead", "SegformerHead"])
def test_a_segmentor_trains(head):
    torch.manual_seed(0)
    model = SemanticSegmentor(
        {"model_name": "softmax_dinov2_small", "img_size": 56, **PLAIN},
        {"type": head, "channels": 8},
        3,
        neck={"type": "SimpleFeaturePyramid", "out_channels": 16},
    )
    assert model.neck.in_stride == 14
    labels = torch.randint(0, 3, (2, 56, 56))
    losses = model(torch.randn(2, 3, 56, 56), labels, mode="loss")
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.neck.parameters())
