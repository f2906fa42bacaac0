_base_ = "../agent/agent_cswin_base_30e_in1k_384.py"

model = dict(backbone=dict(model_name="inline_cswin_base"))

default_hooks = dict(ema=dict(momentum=2.5e-5))
