# RetinaNet by the recipe of MAViT (arXiv:2507.00698).
# The authors do not say on how many GPUs they train. By linear scaling their rate is for 64 images.
_base_ = [
    "../_base_/models/retinanet_fpn.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/coco_adamw_1x.py",
    "../_base_/detection_runtime.py",
]

model = dict(backbone=dict(model_name="mala_vit_tiny", output_norm_eps=1e-6, drop_path_rate=0.1))
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4, lr=4e-4))
auto_scale_lr = dict(base_batch_size=64)
