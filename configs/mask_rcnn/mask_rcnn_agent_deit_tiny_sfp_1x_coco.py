# No paper has a detector on this body. The neck is ViTDet's (arXiv:2203.16527), the schedule that
# of the other bodies rather than ViTDet's 100 epochs at 1024 pixels.
_base_ = [
    "../_base_/models/mask_rcnn_simple_feature_pyramid.py",
    "../_base_/datasets/coco_instance_multi_scale.py",
    "../_base_/schedules/coco_adamw_1x.py",
    "../_base_/decay/agent_swin.py",
    "../_base_/detection_runtime.py",
]

model = dict(backbone=dict(model_name="agent_deit_tiny", drop_path_rate=0.1))
optim_wrapper = dict(dtype="bfloat16", loss_scale=1.0, paramwise_cfg=_base_.paramwise_cfg)
