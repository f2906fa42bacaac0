# RAVLT's recipe (arXiv:2411.07635), "1x".
_base_ = [
    "../_base_/models/semantic_fpn.py",
    "../_base_/datasets/ade20k_512.py",
    "../_base_/schedules/semantic_fpn_80k.py",
    "../_base_/segmentation_runtime.py",
]

model = dict(backbone=dict(model_name="rala_vit_tiny", drop_path_rate=0.1, output_norm_eps=1e-6))
train_cfg = dict(val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000))
