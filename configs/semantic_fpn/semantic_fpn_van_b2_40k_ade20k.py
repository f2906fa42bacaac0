_base_ = "./semantic_fpn_van_b0_40k_ade20k.py"

model = dict(backbone=dict(model_name="van_b2", drop_path_rate=0.2))
