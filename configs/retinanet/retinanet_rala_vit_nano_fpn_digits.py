_base_ = [
    "../_base_/models/retinanet_fpn.py",
    "../_base_/datasets/digits_detection.py",
    "../_base_/schedules/digits_nmuon.py",
    "../_base_/detection_runtime.py",
]

model = dict(
    # Digits are small, so the maps of all stages are used.
    backbone=dict(
        model_name="rala_vit_nano",
        pretrained=False,
        out_indices=(0, 1, 2, 3),
        output_norm_eps=1e-6,
    ),
    neck=dict(out_channels=64, add_extra_convs=False, num_outs=4),
    bbox_head=dict(
        num_classes=10,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        anchor_generator=dict(scales_per_octave=2, ratios=[1.75], strides=[4, 8, 16, 32]),
    ),
    test_cfg=dict(nms_pre=200, max_per_img=20),
)
val_evaluator = dict(metric="bbox")
test_evaluator = val_evaluator
