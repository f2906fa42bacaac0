# RAVLT's recipe (arXiv:2411.07635), "2x". It differs from the authors' code in one point: the
# decay starts at the full rate after the warm-up, where theirs counts the warm-up in (1 % less).
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py",
    "../_base_/schedules/upernet_160k.py",
    "../_base_/decay/norm.py",
    "../_base_/segmentation_runtime.py",
]

model = dict(backbone=dict(model_name="rala_vit_small", drop_path_rate=0.15, output_norm_eps=1e-6))
train_cfg = dict(val_interval=8000)

optim_wrapper = dict(type="AmpOptimWrapper", loss_scale=512.0, paramwise_cfg=_base_.paramwise_cfg)
