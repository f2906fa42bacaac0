_base_ = "./softmax_pvtv2_b0_300e_in1k.py"

model = dict(backbone=dict(model_name="softmax_pvtv2_b1"))
