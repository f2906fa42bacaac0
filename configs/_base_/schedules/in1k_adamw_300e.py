# The learning rate is 5e-4 * batch / 512, so 1e-3 at the base batch of 1,024. mmengine scales it to
# the actual batch (batch_size * GPUs), but does not scale eta_min.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale="dynamic",
    constructor="TimmOptimWrapperConstructor",
    optimizer=dict(opt="adamw", lr=1e-3, weight_decay=0.05, fused=True),
)
auto_scale_lr = dict(enable=True, base_batch_size=1024)

param_scheduler = [
    # The warm-up starts at 1e-6 and moves in each iteration.
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=5, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-5,
        T_max=295,
        begin=5,
        end=300,
        convert_to_iter_based=True,
    ),
]

train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = dict()
test_cfg = dict()

sync_bn = "torch"
