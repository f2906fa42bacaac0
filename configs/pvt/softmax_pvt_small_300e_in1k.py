_base_ = "./softmax_pvt_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="softmax_pvt_small"))
