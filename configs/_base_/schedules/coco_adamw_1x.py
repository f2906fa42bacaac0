# 12 epochs with AdamW. The learning rate is for a batch of 16, and mmengine scales it to the actual
# batch (batch_size * GPUs).
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale="dynamic",
    optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05, fused=True),
)
auto_scale_lr = dict(enable=True, base_batch_size=16)

param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=12, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

# Batch norm takes its statistics over all GPUs, since the two images of one are too few.
sync_bn = "torch"
