# Scenes of one handwritten digit, drawn on the fly. Training and test share no handwriting.
train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    # Workers get their seeds when they start. Starting them in each epoch makes resuming exact.
    persistent_workers=False,
    drop_last=True,
    # Each epoch draws a tenth of the scenes.
    sampler=dict(type="RepeatAugSampler", num_repeats=1, selected_ratio=10),
    collate_fn=dict(type="default_collate"),
    worker_init_fn=dict(type="torch_worker_seed"),
    dataset=dict(
        type="DigitClassification",
        split="train",
        length=42450,
        size=64,
        digit_size=(0.7, 0.95),
        clutter=2,
        distortion=0.3,
        # Each scene has its own slant, width and pen. Cropping and stretching it as well would cost
        # accuracy.
        transform=dict(input_size=64, crop_pct=1.0),
    ),
)
val_dataloader = dict(
    batch_size=191,
    num_workers=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    worker_init_fn=dict(type="torch_worker_seed"),
    dataset=dict(
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

val_evaluator = dict(type="Accuracy", topk=(1, 5))
test_evaluator = val_evaluator
