# Cascade Mask R-CNN by the recipe of Swin, as FLatten Transformer (arXiv:2308.00442) is trained.
_base_ = "./cascade_mask_rcnn_softmax_swin_tiny_fpn_3x_coco.py"

model = dict(backbone=dict(model_name="flatten_swin_tiny"))
