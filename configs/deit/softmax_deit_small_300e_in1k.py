_base_ = "./softmax_deit_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="softmax_deit_small"))
