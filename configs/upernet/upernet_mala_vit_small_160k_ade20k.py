_base_ = "./upernet_rala_vit_small_160k_ade20k.py"

model = dict(backbone=dict(model_name="mala_vit_small", drop_path_rate=0.15))
