_base_ = "./upernet_soft_norm_vit_small_160k_ade20k.py"

model = dict(backbone=dict(model_name="soft_norm_vit_medium"))
