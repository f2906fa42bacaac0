# Scenes of handwritten digits, drawn on the fly. Training and test share no handwriting. The digits
# are large, so that most of their pixels are not at an edge.
train_dataloader = dict(
    batch_size=16,
    num_workers=1,
    drop_last=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    worker_init_fn=dict(type="torch_worker_seed"),
    dataset=dict(
        type="DigitSegmentation",
        split="train",
        length=141500,
        size=96,
        digits=(1, 4),
        digit_size=(0.4, 0.7),
        clutter=4,
    ),
)
val_dataloader = dict(
    batch_size=191,
    num_workers=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="DigitSegmentation",
        split="test",
        length=382,
        size=96,
        digits=(1, 4),
        digit_size=(0.4, 0.7),
        clutter=4,
        test_mode=True,
    ),
)
test_dataloader = val_dataloader
