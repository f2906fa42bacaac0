_base_ = "../agent/agent_cswin_small_300e_in1k.py"

model = dict(backbone=dict(model_name="flatten_cswin_small"))
