# Cascade Mask R-CNN by the recipe of Swin (arXiv:2103.14030), 12 epochs.
_base_ = [
    "../_base_/models/cascade_mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance_multi_scale.py",
    "../_base_/schedules/coco_adamw_1x.py",
    "../_base_/decay/swin.py",
    "../_base_/detection_runtime.py",
]

model = dict(
    backbone=dict(model_name="softmax_swin_tiny", output_norm_eps=1e-5, drop_path_rate=0.1)
)
optim_wrapper = dict(paramwise_cfg=_base_.paramwise_cfg)
