# DINOv2-S on some twenty photographs, some minutes on one GPU. Each pass repeats the photographs
# with other crops and colours and pieces of one another, and batches of several sizes teach the
# student to agree at sizes between and beyond. The stage of the features is left out: so few
# photographs are learned by heart there, see docs/linearise.md.
_base_ = ["linearise_pictures.py"]

model = dict(sizes=(224, 392, 518, 700), cutmix=0.5, stages=dict(_delete_=True, mixers=1.0))
train_dataloader = dict(
    batch_size=16,
    num_workers=14,
    persistent_workers=True,
    dataset=dict(
        length=1600,
        transform=dict(
            input_size=518,
            scale=(0.05, 1.0),
            color_jitter=(0.4, 0.4, 0.6, 0.1),
            grayscale_prob=0.1,
            vflip=0.2,
        ),
    ),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    loss_scale=1.0,
    optimizer=dict(lr=1e-3, betas=(0.9, 0.95)),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-2, begin=0, end=1, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-6,
        T_max=74,
        begin=1,
        end=75,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=75, val_interval=5)
