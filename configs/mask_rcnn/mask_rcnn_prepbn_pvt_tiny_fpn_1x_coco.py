# Mask R-CNN by the recipe of PVT, as PRepBN (arXiv:2405.11582) is trained: norms are batch norms
# from the start, with the statistics of pretraining.
_base_ = [
    "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/coco_adamw_1x.py",
    "../_base_/detection_runtime.py",
]

model = dict(backbone=dict(model_name="prepbn_pvt_tiny", norm_eval=True, drop_path_rate=0.1))
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05))
