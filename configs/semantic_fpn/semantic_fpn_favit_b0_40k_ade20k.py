# FaViT's recipe (arXiv:2312.08614), whose authors have published no weights.
_base_ = [
    "../_base_/models/semantic_fpn.py",
    "../_base_/datasets/ade20k_512.py",
    "../_base_/schedules/semantic_fpn_80k.py",
    "../_base_/segmentation_runtime.py",
]

model = dict(backbone=dict(model_name="favit_b0", drop_path_rate=0.1))

optim_wrapper = dict(optimizer=dict(lr=2.4e-4, weight_decay=0.01))
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=0.0, begin=0, end=40000, by_epoch=False)]
train_cfg = dict(max_iters=40000, val_interval=4000)
