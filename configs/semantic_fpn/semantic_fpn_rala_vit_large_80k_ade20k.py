_base_ = "./semantic_fpn_rala_vit_tiny_80k_ade20k.py"

model = dict(backbone=dict(model_name="rala_vit_large", drop_path_rate=0.55))
