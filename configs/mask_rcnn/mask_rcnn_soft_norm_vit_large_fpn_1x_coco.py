_base_ = "./mask_rcnn_soft_norm_vit_tiny_fpn_1x_coco.py"

model = dict(backbone=dict(model_name="soft_norm_vit_large"))
