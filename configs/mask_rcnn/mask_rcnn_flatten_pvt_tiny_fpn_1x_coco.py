# Mask R-CNN by the recipe of PVT, as FLatten Transformer (arXiv:2308.00442) is trained.
_base_ = [
    "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/coco_adamw_1x.py",
    "../_base_/detection_runtime.py",
]

model = dict(backbone=dict(model_name="flatten_pvt_tiny", drop_path_rate=0.1))
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=1e-4))
