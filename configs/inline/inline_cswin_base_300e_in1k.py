_base_ = "../agent/agent_cswin_base_300e_in1k.py"

model = dict(backbone=dict(model_name="inline_cswin_base"))

default_hooks = dict(ema=dict(momentum=5e-5))
