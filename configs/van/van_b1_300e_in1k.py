_base_ = "./van_b0_300e_in1k.py"

model = dict(backbone=dict(model_name="van_b1", drop_path_rate=0.1))
