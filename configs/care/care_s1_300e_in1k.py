_base_ = "./care_s0_300e_in1k.py"

model = dict(backbone=dict(model_name="care_s1"))
