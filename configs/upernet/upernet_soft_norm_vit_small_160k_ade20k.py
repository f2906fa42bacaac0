# SOFT-Norm (arXiv:2207.03341) publishes results with UPerNet but no recipe. This is Swin's recipe.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py",
    "../_base_/schedules/upernet_160k.py",
    "../_base_/decay/norm.py",
    "../_base_/segmentation_runtime.py",
]

model = dict(backbone=dict(model_name="soft_norm_vit_small", drop_path_rate=0.1))

optim_wrapper = dict(paramwise_cfg=_base_.paramwise_cfg)
