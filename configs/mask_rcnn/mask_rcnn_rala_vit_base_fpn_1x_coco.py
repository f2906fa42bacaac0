_base_ = "./mask_rcnn_rala_vit_tiny_fpn_1x_coco.py"

model = dict(backbone=dict(model_name="rala_vit_base", drop_path_rate=0.4))
