_base_ = "retinanet_soft_norm_vit_tiny_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="soft_norm_vit_medium"), neck=dict(in_channels=[128, 288, 512])
)
