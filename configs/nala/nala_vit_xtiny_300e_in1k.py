_base_ = "./nala_vit_tiny_300e_in1k.py"

model = dict(backbone=dict(model_name="nala_vit_xtiny"))
