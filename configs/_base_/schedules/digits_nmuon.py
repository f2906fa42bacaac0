# Training from scratch on digit scenes, in minutes. Muon needs a third of AdamW's iterations.
optim_wrapper = dict(
    constructor="TimmOptimWrapperConstructor",
    optimizer=dict(opt="nmuon32", lr=8e-3, weight_decay=0.05),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-2, begin=0, end=200, by_epoch=False),
    dict(
        type="CosineAnnealingLR", eta_min=1e-5, T_max=6, begin=1, end=7, convert_to_iter_based=True
    ),
]
train_cfg = dict(by_epoch=True, max_epochs=7, val_interval=3)
val_cfg = dict()
test_cfg = dict()
