# The same on scenes of handwritten digits, for a classifier of them.
_base_ = ["linearise_pictures.py"]

model = dict(
    teacher=dict(
        model_name="softmax_deit_tiny",
        img_size=64,
        patch_size=8,
        embed_dim=96,
        depth=4,
        num_classes=10,
    ),
    stages=dict(mixers=0.4, features=0.4, logits=0.2),
)
train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    sampler=dict(_delete_=True, type="RepeatAugSampler", num_repeats=1, selected_ratio=10),
    dataset=dict(
        _delete_=True,
        type="DigitClassification",
        split="train",
        length=42450,
        size=64,
        digit_size=(0.7, 0.95),
        clutter=2,
        distortion=0.3,
        transform=dict(input_size=64, crop_pct=1.0),
    ),
)
val_dataloader = dict(
    batch_size=191,
    num_workers=1,
    dataset=dict(
        _delete_=True,
        type="DigitClassification",
        split="test",
        length=764,
        size=64,
        digit_size=(0.7, 0.95),
        clutter=2,
        transform=dict(input_size=64, crop_pct=1.0),
    ),
)
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(
        type="CosineAnnealingLR", eta_min=1e-5, T_max=6, begin=0, end=6, convert_to_iter_based=True
    )
]
train_cfg = dict(max_epochs=6, val_interval=2)
