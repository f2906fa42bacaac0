"""A detector that trains in seconds: ATSS on `rala_vit_nano` and a few small digit scenes."""

from pathlib import Path

import pytest
from mmengine.registry import DefaultScope

import linsight.kernels.mmcv_operators  # noqa: F401  before any test imports mmdet
from linsight.data.digits_coco import write_coco

# ATSS averages its losses over the objects of all processes. RetinaNet and the two-stage
# detectors average over each process's own objects, and draw the regions to train on at random.
CONFIG = """
custom_imports = dict(
    imports=[
        "linsight",
        "linsight.data.classification",
        "linsight.data.coco",
        "linsight.heads",
        "mmdet.registry",
    ]
)
default_scope = "mmdet"
randomness = dict(seed=0)

model = dict(
    type="ATSS",
    data_preprocessor=dict(
        type="DetDataPreprocessor", mean=[127.0] * 3, std=[64.0] * 3, pad_size_divisor=32
    ),
    backbone=dict(
        type="TimmBackbone",
        model_name="rala_vit_nano",
        out_indices=(1, 2),
        output_norm_eps=1e-6,
        norm_eval=True,
    ),
    neck=dict(type="FPN", in_channels=[64, 128], out_channels=32, num_outs=2),
    bbox_head=dict(
        type="ATSSHead",
        num_classes=10,
        in_channels=32,
        stacked_convs=1,
        feat_channels=32,
        anchor_generator=dict(
            type="AnchorGenerator",
            ratios=[1.0],
            octave_base_scale=4,
            scales_per_octave=1,
            strides=[8, 16],
        ),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_stds=[0.1, 0.1, 0.2, 0.2]),
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25),
        loss_bbox=dict(type="GIoULoss", loss_weight=2.0),
        loss_centerness=dict(type="CrossEntropyLoss", use_sigmoid=True),
    ),
    train_cfg=dict(
        assigner=dict(type="ATSSAssigner", topk=9), allowed_border=-1, pos_weight=-1
    ),
    test_cfg=dict(
        nms_pre=100,
        min_bbox_size=0,
        score_thr=0.0,
        nms=dict(type="nms", iou_threshold=0.6),
        max_per_img=20,
    ),
)

_loading = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True)]
_data = dict(
    type="CheckedCocoDataset",
    data_root="{root}",
    metainfo=dict(classes={classes}),
    serialize_data=False,  # spares a collection of garbage
)
train_dataloader = dict(
    batch_size={batch_size},
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        ann_file="instances_train.json",
        data_prefix=dict(img="images/train/"),
        pipeline=[*_loading, dict(type="PackDetInputs")],
        **_data,
    ),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        ann_file="instances_test.json",
        data_prefix=dict(img="images/test/"),
        test_mode=True,
        pipeline=[
            *_loading,
            dict(type="Resize", scale=(64, 64)),  # for the scale factor, which is 1
            dict(
                type="PackDetInputs",
                meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
            ),
        ],
        **_data,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type="CocoMetric", ann_file="{root}/instances_test.json", metric="bbox"
)
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05))
param_scheduler = [dict(type="LinearLR", start_factor=0.1, by_epoch=False, end=4)]
train_cfg = dict(by_epoch=True, max_epochs={epochs}, val_interval=1)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=1),
    checkpoint=dict(
        type="SafeCheckpointHook", interval=1, max_keep_ckpts=2, save_best="coco/bbox_mAP"
    ),
    epoch_seed=dict(type="EpochSeedHook"),
    checked_load=dict(type="CheckedLoadHook"),
    resume_validation=dict(type="ResumeValidationHook"),
    data_check=dict(type="DataCheckHook"),
)
"""
CLASSES = tuple("0123456789")


def write_config(
    folder: Path, *, train: int = 8, test: int = 2, batch_size: int = 4, epochs: int = 2
) -> Path:
    """Digit scenes in `folder` and the config of a detector that trains on them."""
    root = write_coco(folder / "digits", train=train, test=test, size=64, digits=(1, 4))
    path = folder / "tiny.py"
    settings = {"root": root, "classes": CLASSES, "batch_size": batch_size, "epochs": epochs}
    text = CONFIG
    for key, value in settings.items():
        text = text.replace("{" + key + "}", str(value))
    path.write_text(text)
    return path


@pytest.fixture(scope="module", autouse=True)
def _in_mmdets_scope():
    """Types are looked for in mmdet first, until these tests are over."""
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The path of a config that trains in seconds."""
    return write_config(tmp_path_factory.mktemp("detection"))
