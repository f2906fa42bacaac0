_base_ = "./mask_rcnn_agent_swin_tiny_fpn_3x_coco.py"

model = dict(backbone=dict(model_name="agent_swin_small"))
