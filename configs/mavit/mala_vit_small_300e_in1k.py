_base_ = "./mala_vit_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="mala_vit_small", drop_path_rate=0.15))
