_base_ = "./agent_deit_small_300e_in1k.py"

model = dict(backbone=dict(model_name="agent_deit_base", drop_path_rate=0.3))
