_base_ = "./semantic_fpn_van_b0_40k_ade20k.py"

model = dict(backbone=dict(model_name="van_b1", drop_path_rate=0.1))
