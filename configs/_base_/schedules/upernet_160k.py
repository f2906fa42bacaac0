# The learning rate is for a batch of 16. mmengine scales it to the actual batch.
optim_wrapper = dict(
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01, fused=True)
)
auto_scale_lr = dict(enable=True, base_batch_size=16)

param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, begin=0, end=1500, by_epoch=False),
    dict(type="PolyLR", power=1.0, eta_min=0.0, begin=1500, end=160000, by_epoch=False),
]

train_cfg = dict(by_epoch=False, max_iters=160000, val_interval=16000)

sync_bn = "torch"
