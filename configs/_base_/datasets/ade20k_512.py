# The unpacked ADEChallengeData2016, as the scene parsing benchmark gives it.
data_root = "data/ade/ADEChallengeData2016"

train_dataloader = dict(
    # For each GPU. The recipes' batch is 16 in all: 8 GPUs of 2.
    batch_size=2,
    num_workers=4,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    worker_init_fn=dict(type="torch_worker_seed"),
    dataset=dict(
        type="ADE20K",
        root=data_root,
        split="training",
        transforms=[
            # The shorter side to 512, times 0.5 to 2, in steps of 16.
            dict(
                type="torchvision.transforms.v2.RandomShortestSize",
                min_size=list(range(256, 1025, 16)),
                antialias=False,
            ),
            dict(type="RandomClassCrop", size=512, cat_max_ratio=0.75),
            dict(type="torchvision.transforms.v2.RandomHorizontalFlip", p=0.5),
            # Photometric distortion.
            dict(
                type="torchvision.transforms.v2.RandomApply",
                transforms=[
                    dict(type="torchvision.transforms.v2.ColorJitter", brightness=(0.875, 1.125))
                ],
                p=0.5,
            ),
            dict(
                type="torchvision.transforms.v2.RandomApply",
                transforms=[dict(type="torchvision.transforms.v2.ColorJitter", contrast=0.5)],
                p=0.5,
            ),
            dict(
                type="torchvision.transforms.v2.RandomApply",
                transforms=[dict(type="torchvision.transforms.v2.ColorJitter", saturation=0.5)],
                p=0.5,
            ),
            dict(
                type="torchvision.transforms.v2.RandomApply",
                transforms=[dict(type="torchvision.transforms.v2.ColorJitter", hue=0.1)],
                p=0.5,
            ),
        ],
    ),
)
val_dataloader = dict(
    # Images differ in size.
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ADE20K",
        root=data_root,
        split="validation",
        test_mode=True,
        transforms=[
            dict(type="torchvision.transforms.v2.Resize", size=512, max_size=2048, antialias=False),
        ],
    ),
)
test_dataloader = val_dataloader
