_base_ = "../agent/agent_cswin_small_300e_in1k.py"

model = dict(backbone=dict(model_name="inline_cswin_small"))

default_hooks = dict(ema=dict(momentum=1e-4))
