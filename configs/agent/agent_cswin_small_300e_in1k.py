_base_ = "./agent_cswin_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="agent_cswin_small", drop_path_rate=0.4))
