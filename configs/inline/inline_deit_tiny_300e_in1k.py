# InLine-DeiT's recipe for ImageNet-1K (arXiv:2412.06590): Agent-DeiT's, with stochastic depth in
# every size.
_base_ = "../agent/agent_deit_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="inline_deit_tiny", drop_path_rate=0.1))
