_base_ = "./favit_b0_300e_in1k.py"

model = dict(backbone=dict(model_name="favit_b1"))
