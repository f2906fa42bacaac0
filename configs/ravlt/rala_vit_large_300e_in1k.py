_base_ = "./rala_vit_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="rala_vit_large", drop_path_rate=0.55))
