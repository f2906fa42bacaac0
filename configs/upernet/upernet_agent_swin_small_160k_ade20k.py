_base_ = "./upernet_agent_swin_tiny_160k_ade20k.py"

model = dict(backbone=dict(model_name="agent_swin_small"))
