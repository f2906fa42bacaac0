_base_ = "./upernet_van_b0_160k_ade20k.py"

model = dict(backbone=dict(model_name="van_b3", drop_path_rate=0.2))
