# Boxes of COCO 2017 from annotations/, train2017/ and val2017/ in data/coco, or
# --cfg-options data_root=...
_base_ = "mmdet::_base_/datasets/coco_detection.py"

# Workers get their seeds when they start. Starting them in each epoch makes resuming exact.
train_dataloader = dict(
    num_workers=4,
    persistent_workers=False,
    worker_init_fn=dict(type="torch_worker_seed"),
    dataset=dict(type="CheckedCocoDataset"),
)
val_dataloader = dict(
    num_workers=4, persistent_workers=False, dataset=dict(type="CheckedCocoDataset")
)
test_dataloader = val_dataloader
val_evaluator = dict(type="QuietCocoMetric")
test_evaluator = val_evaluator

# For `linsight test --tta`: three scales, each also mirrored. mmdet merges boxes but no masks.
tta_model = dict(
    type="DetTTAModel", tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100)
)
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [
                dict(type="Resize", scale=scale, keep_ratio=True)
                for scale in ((1333, 800), (666, 400), (2000, 1200))
            ],
            [dict(type="RandomFlip", prob=1.0), dict(type="RandomFlip", prob=0.0)],
            [dict(type="LoadAnnotations", with_bbox=True)],
            [
                dict(
                    type="PackDetInputs",
                    meta_keys=(
                        "img_id",
                        "img_path",
                        "ori_shape",
                        "img_shape",
                        "scale_factor",
                        "flip",
                        "flip_direction",
                    ),
                )
            ],
        ],
    ),
]
