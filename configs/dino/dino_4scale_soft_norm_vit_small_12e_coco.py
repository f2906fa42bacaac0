_base_ = "./dino_4scale_rala_vit_small_12e_coco.py"

model = dict(backbone=dict(model_name="soft_norm_vit_small", drop_path_rate=0.1))
