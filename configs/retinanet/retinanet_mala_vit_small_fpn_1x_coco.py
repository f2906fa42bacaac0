_base_ = "./retinanet_mala_vit_tiny_fpn_1x_coco.py"

model = dict(backbone=dict(model_name="mala_vit_small", drop_path_rate=0.15))
