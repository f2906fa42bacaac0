# 4 images on each of 8 GPUs.
_base_ = "./semantic_fpn_favit_b0_40k_ade20k.py"

model = dict(backbone=dict(model_name="favit_b3"))
train_dataloader = dict(batch_size=4)
auto_scale_lr = dict(base_batch_size=32)
optim_wrapper = dict(optimizer=dict(lr=1.2e-4))
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=0.0, begin=0, end=80000, by_epoch=False)]
train_cfg = dict(max_iters=80000, val_interval=8000)
