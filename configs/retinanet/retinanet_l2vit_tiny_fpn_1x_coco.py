# RetinaNet by the recipe of L2ViT (arXiv:2501.16182).
_base_ = [
    "../_base_/models/retinanet_fpn.py",
    "../_base_/datasets/coco_detection_multi_scale.py",
    "../_base_/schedules/coco_adamw_1x.py",
    "../_base_/detection_runtime.py",
]

model = dict(backbone=dict(model_name="l2vit_tiny", output_norm_eps=1e-5, drop_path_rate=0.1))
