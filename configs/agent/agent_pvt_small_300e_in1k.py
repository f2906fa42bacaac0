_base_ = "./agent_pvt_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="agent_pvt_small"))
