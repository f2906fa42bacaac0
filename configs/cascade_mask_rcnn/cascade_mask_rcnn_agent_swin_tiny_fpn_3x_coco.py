# Cascade Mask R-CNN by the recipe of Agent Attention (arXiv:2312.08874), with more agents than
# in pretraining. Training is in bfloat16, the authors' in float32.
_base_ = [
    "../_base_/models/cascade_mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance_multi_scale.py",
    "../_base_/schedules/coco_adamw_3x.py",
    "../_base_/decay/agent_swin.py",
    "../_base_/detection_runtime.py",
]

model = dict(
    backbone=dict(
        model_name="agent_swin_tiny",
        output_norm_eps=1e-5,
        drop_path_rate=0.1,
        mixer_options=dict(agent=dict(agent_grid=(9, 12, 14, 7))),
    )
)
optim_wrapper = dict(dtype="bfloat16", loss_scale=1.0, paramwise_cfg=_base_.paramwise_cfg)
