# Scenes of one handwritten digit, made on the fly; training and test share no handwriting.
# Every scene is different, so that it needs no augmentation.
train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    # Workers take their seeds as they start: starting anew each epoch makes resuming exact.
    persistent_workers=False,
    drop_last=True,
    # Each epoch draws a seventh of the scenes.
    sampler=dict(type="RepeatAugSampler", num_repeats=1, selected_ratio=7),
    collate_fn=dict(type="default_collate"),
    worker_init_fn=dict(type="torch_worker_seed"),
    dataset=dict(
        type="DigitClassification",
        split="train",
        length=28300,
        size=64,
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
        transform=dict(input_size=64, crop_pct=1.0),
    ),
)
test_dataloader = val_dataloader
