# Mask R-CNN by the recipe of RAVLT (arXiv:2411.07635).
_base_ = [
    "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance_multi_scale.py",
    "../_base_/schedules/coco_adamw_3x.py",
    "../_base_/decay/norm.py",
    "../_base_/detection_runtime.py",
]

model = dict(backbone=dict(model_name="rala_vit_small", output_norm_eps=1e-6, drop_path_rate=0.15))
optim_wrapper = dict(paramwise_cfg=_base_.paramwise_cfg)
