# Mask R-CNN on SLAB's Swin (arXiv:2405.11582), with more stochastic depth than on the tiny one.
_base_ = "./mask_rcnn_slab_swin_tiny_fpn_1x_coco.py"

model = dict(backbone=dict(model_name="slab_swin_small", drop_path_rate=0.2))
