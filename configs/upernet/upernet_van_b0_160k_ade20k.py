# VAN's recipe (arXiv:2202.09741), whose published figures are tested at several scales. Stochastic
# depth is that of the classifiers.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py",
    "../_base_/schedules/upernet_160k.py",
    "../_base_/decay/norm.py",
    "../_base_/segmentation_runtime.py",
]

model = dict(backbone=dict(model_name="van_b0", drop_path_rate=0.1))

optim_wrapper = dict(paramwise_cfg=_base_.paramwise_cfg)
