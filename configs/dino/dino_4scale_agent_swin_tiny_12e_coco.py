_base_ = "./dino_4scale_rala_vit_small_12e_coco.py"

model = dict(
    backbone=dict(
        model_name="agent_swin_tiny",
        output_norm_eps=1e-5,
        drop_path_rate=0.1,
        mixer_options=dict(agent=dict(agent_grid=(9, 12, 14, 7))),
    )
)
