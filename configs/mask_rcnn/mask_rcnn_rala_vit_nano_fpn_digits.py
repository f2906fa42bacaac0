# The demonstration trains from scratch in less than a quarter of an hour on two CPU cores.
_base_ = [
    "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/digits_detection.py",
    "../_base_/schedules/digits_nmuon.py",
    "../_base_/detection_runtime.py",
]

model = dict(
    backbone=dict(model_name="rala_vit_nano", pretrained=False, output_norm_eps=1e-6),
    neck=dict(out_channels=64, num_outs=4),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        # Digits are 15 to 45 pixels in size, and nearly twice as high as wide.
        anchor_generator=dict(
            _delete_=True,
            type="AnchorGenerator",
            octave_base_scale=4,
            scales_per_octave=2,
            ratios=[1.75],
            strides=[4, 8, 16, 32],
        ),
    ),
    roi_head=dict(
        # Regions this small all lie on the finest map; one sample per bin is enough.
        bbox_roi_extractor=dict(
            roi_layer=dict(sampling_ratio=1), out_channels=64, featmap_strides=[4]
        ),
        bbox_head=dict(
            in_channels=64, fc_out_channels=128, num_classes=10, reg_class_agnostic=True
        ),
        mask_roi_extractor=dict(
            roi_layer=dict(sampling_ratio=1), out_channels=64, featmap_strides=[4]
        ),
        mask_head=dict(
            num_convs=2, in_channels=64, conv_out_channels=64, num_classes=10, class_agnostic=True
        ),
    ),
    train_cfg=dict(
        rpn=dict(assigner=dict(pos_iou_thr=0.6), sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=48, pos_fraction=0.34)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50), rcnn=dict(max_per_img=20)),
)

train_dataloader = dict(dataset=dict(length=9600))
