_base_ = "./mask_rcnn_agent_pvt_tiny_fpn_1x_coco.py"

model = dict(backbone=dict(model_name="agent_pvt_medium"))
