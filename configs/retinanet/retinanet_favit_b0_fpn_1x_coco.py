# RetinaNet by the recipe of FaViT (arXiv:2312.08614), whose authors have published no weights.
_base_ = [
    "../_base_/models/retinanet_fpn.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/coco_adamw_1x.py",
    "../_base_/detection_runtime.py",
]

model = dict(backbone=dict(model_name="favit_b0", drop_path_rate=0.1))
