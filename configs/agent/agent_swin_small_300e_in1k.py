_base_ = "./agent_swin_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="agent_swin_small", drop_path_rate=0.3))
