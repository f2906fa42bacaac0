# Mask R-CNN by the recipe of FaViT (arXiv:2312.08614), whose authors have published no weights.
# B0 and B1 have a batch of 32 and twice the rate there, which is the same rate for each image.
_base_ = [
    "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/coco_adamw_1x.py",
    "../_base_/detection_runtime.py",
]

model = dict(backbone=dict(model_name="favit_b0", drop_path_rate=0.1))
