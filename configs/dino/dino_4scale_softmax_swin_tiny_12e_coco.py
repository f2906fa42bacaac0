_base_ = "./dino_4scale_rala_vit_small_12e_coco.py"

model = dict(
    backbone=dict(model_name="softmax_swin_tiny", output_norm_eps=1e-5, drop_path_rate=0.2)
)
