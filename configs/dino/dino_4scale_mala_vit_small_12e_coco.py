_base_ = "./dino_4scale_rala_vit_small_12e_coco.py"

model = dict(backbone=dict(model_name="mala_vit_small"))
