# The learning rate is for a batch of 16. mmengine scales it to the actual batch.
optim_wrapper = dict(optimizer=dict(type="AdamW", lr=1e-4, weight_decay=1e-4, fused=True))
auto_scale_lr = dict(enable=True, base_batch_size=16)

param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=1e-6, begin=0, end=80000, by_epoch=False)]

train_cfg = dict(by_epoch=False, max_iters=80000, val_interval=8000)

sync_bn = "torch"
