# VAN's recipe (arXiv:2202.09741), a batch of 32. Stochastic depth is that of the classifiers, but
# for B2, whose rate the authors have published.
_base_ = [
    "../_base_/models/semantic_fpn.py",
    "../_base_/datasets/ade20k_512.py",
    "../_base_/schedules/semantic_fpn_80k.py",
    "../_base_/segmentation_runtime.py",
]

model = dict(backbone=dict(model_name="van_b0", drop_path_rate=0.1))

# 4 images on each of 8 GPUs.
train_dataloader = dict(batch_size=4)
auto_scale_lr = dict(base_batch_size=32)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=0.0, begin=0, end=40000, by_epoch=False)]
train_cfg = dict(max_iters=40000, val_interval=4000)
