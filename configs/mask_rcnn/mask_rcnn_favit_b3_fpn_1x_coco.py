_base_ = "./mask_rcnn_favit_b0_fpn_1x_coco.py"

model = dict(backbone=dict(model_name="favit_b3"))
