# 12 epochs with AdamW at a batch of 16; another batch (batch_size * GPUs) scales the rate.
_base_ = "mmdet::_base_/schedules/schedule_1x.py"

optim_wrapper = dict(
    _delete_=True,
    type="AmpOptimWrapper",
    loss_scale="dynamic",
    optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05, fused=True),
)
auto_scale_lr = dict(enable=True, base_batch_size=16)

# Statistics of batch norm over all GPUs: two images are too few.
sync_bn = "torch"
