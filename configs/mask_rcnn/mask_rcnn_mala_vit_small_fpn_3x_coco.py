# Mask R-CNN by the recipe of MAViT (arXiv:2507.00698).
# The authors do not say on how many GPUs they train. By linear scaling their rate is for 64 images.
_base_ = [
    "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance_multi_scale.py",
    "../_base_/schedules/coco_adamw_3x.py",
    "../_base_/decay/norm.py",
    "../_base_/detection_runtime.py",
]

model = dict(backbone=dict(model_name="mala_vit_small", output_norm_eps=1e-6, drop_path_rate=0.15))
optim_wrapper = dict(optimizer=dict(lr=4e-4), paramwise_cfg=_base_.paramwise_cfg)
auto_scale_lr = dict(base_batch_size=64)
