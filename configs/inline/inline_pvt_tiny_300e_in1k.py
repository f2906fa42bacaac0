# InLine-PVT's recipe for ImageNet-1K (arXiv:2412.06590), which is that of Agent-PVT.
_base_ = "../agent/agent_pvt_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="inline_pvt_tiny"))
