# InLine-CSwin's recipe for ImageNet-1K (arXiv:2412.06590): Agent-CSwin's, whose weights are
# averaged over more iterations.
_base_ = "../agent/agent_cswin_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="inline_cswin_tiny"))

default_hooks = dict(ema=dict(momentum=1e-4))
