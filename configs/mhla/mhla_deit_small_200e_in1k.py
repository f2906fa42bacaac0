_base_ = "./mhla_deit_tiny_200e_in1k.py"

model = dict(backbone=dict(model_name="mhla_deit_small"))
