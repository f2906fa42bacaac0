_base_ = "./semantic_fpn_agent_pvt_tiny_40k_ade20k.py"

model = dict(backbone=dict(model_name="agent_pvt_small", drop_path_rate=0.1))
