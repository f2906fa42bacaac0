_base_ = "./flatten_pvtv2_b0_300e_in1k.py"

model = dict(backbone=dict(model_name="flatten_pvtv2_b2"))
