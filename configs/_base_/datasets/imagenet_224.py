# The folder with train/ and val/, each with one sub-folder per class. TimmDataset also reads tar
# files, webdataset and Hugging Face data sets: dataset.name="wds/...", "hfds/OWNER/NAME" or
# "hfds//path/to/a/folder"; data_root is then where the Hugging Face data sets are cached.
data_root = "data/imagenet"

train_dataloader = dict(
    # Per GPU. The recipe uses a batch of 1,024 in total, 128 on each of 8 GPUs.
    batch_size=128,
    num_workers=12,
    # Workers get their seeds when they start. Starting them in each epoch makes resuming exact.
    persistent_workers=False,
    pin_memory=True,
    # Mixup pairs the images of a batch.
    drop_last=True,
    sampler=dict(type="RepeatAugSampler", num_repeats=3),
    collate_fn=dict(type="default_collate"),
    worker_init_fn=dict(type="torch_worker_seed"),
    dataset=dict(
        type="TimmDataset",
        root=data_root,
        split="train",
        transform=dict(
            input_size=224,
            is_training=True,
            auto_augment="rand-m9-mstd0.5-inc1",
            color_jitter=0.4,
            re_prob=0.25,
            re_mode="pixel",
            interpolation="bicubic",
        ),
        # Workers decode, crop and mirror; RandAugment, erasing and normalisation are the GPU's.
        augment_on_device=True,
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=12,
    pin_memory=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    worker_init_fn=dict(type="torch_worker_seed"),
    dataset=dict(
        type="TimmDataset",
        root=data_root,
        split="validation",
        # Resize the shorter side to 256, and crop the centre.
        transform=dict(input_size=224, crop_pct=0.875, interpolation="bicubic"),
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type="Accuracy", topk=(1, 5))
test_evaluator = val_evaluator
