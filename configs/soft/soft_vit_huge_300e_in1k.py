_base_ = "./soft_vit_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="soft_vit_huge"))
optim_wrapper = dict(optimizer=dict(lr=2.7e-4))
