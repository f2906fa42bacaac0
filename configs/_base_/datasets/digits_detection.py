# Scenes of several handwritten digits, drawn on the fly. Training and test share no handwriting.
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    # Workers get their seeds when they start. Starting them in each epoch makes resuming exact.
    persistent_workers=False,
    drop_last=True,
    # Each epoch draws a tenth of the scenes.
    sampler=dict(type="RepeatAugSampler", num_repeats=1, selected_round=8, selected_ratio=10),
    collate_fn=dict(type="pseudo_collate"),
    worker_init_fn=dict(type="torch_worker_seed"),
    dataset=dict(
        type="DigitDetection",
        split="train",
        length=17920,
        size=128,
        digits=(1, 6),
        digit_size=(0.2, 0.45),
        clutter=4,
        pipeline=[dict(type="PackDetInputs")],
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="pseudo_collate"),
    worker_init_fn=dict(type="torch_worker_seed"),
    dataset=dict(
        type="DigitDetection",
        split="test",
        length=192,
        size=128,
        digits=(1, 6),
        digit_size=(0.2, 0.45),
        clutter=4,
        pipeline=[
            dict(
                type="PackDetInputs",
                meta_keys=("img_id", "ori_shape", "img_shape", "scale_factor", "instances"),
            )
        ],
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type="QuietCocoMetric", metric=["bbox", "segm"])
test_evaluator = val_evaluator
