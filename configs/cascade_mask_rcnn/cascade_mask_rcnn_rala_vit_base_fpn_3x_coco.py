_base_ = "./cascade_mask_rcnn_rala_vit_small_fpn_3x_coco.py"

model = dict(backbone=dict(model_name="rala_vit_base", drop_path_rate=0.4))
