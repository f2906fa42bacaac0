_base_ = "./retinanet_agent_pvt_tiny_fpn_1x_coco.py"

model = dict(backbone=dict(model_name="agent_pvt_large", drop_path_rate=0.3))
