# Mask R-CNN on PRepBN's PVT (arXiv:2405.11582), with another rate and decay than on the tiny one.
_base_ = "./mask_rcnn_prepbn_pvt_tiny_fpn_1x_coco.py"

model = dict(backbone=dict(model_name="prepbn_pvt_small"))
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=1e-4))
