# Mask R-CNN by the recipe of Agent Attention (arXiv:2312.08874), with more agents than
# in pretraining. Training is in bfloat16, the authors' in float32.
_base_ = [
    "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/coco_adamw_1x.py",
    "../_base_/detection_runtime.py",
]

model = dict(
    backbone=dict(
        model_name="agent_pvt_tiny",
        drop_path_rate=0.1,
        mixer_options=dict(agent=dict(agent_grid=(12, 16, 28, 28))),
    )
)
optim_wrapper = dict(dtype="bfloat16", loss_scale=1.0, optimizer=dict(lr=2e-4, weight_decay=1e-4))
