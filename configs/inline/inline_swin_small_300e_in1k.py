_base_ = "../agent/agent_swin_small_300e_in1k.py"

model = dict(backbone=dict(model_name="inline_swin_small"))
