_base_ = "./upernet_rala_vit_small_160k_ade20k.py"

model = dict(backbone=dict(model_name="rala_vit_base", drop_path_rate=0.4))
