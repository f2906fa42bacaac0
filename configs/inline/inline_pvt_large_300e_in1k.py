_base_ = "../agent/agent_pvt_large_300e_in1k.py"

model = dict(backbone=dict(model_name="inline_pvt_large"))
