# Cityscapes with leftImg8bit/ and gtFine/, as its site gives them.
data_root = "data/cityscapes"

train_dataloader = dict(
    # For each GPU: 8 in all on 8 GPUs.
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    worker_init_fn=dict(type="torch_worker_seed"),
    dataset=dict(
        type="Cityscapes",
        root=data_root,
        split="train",
        transforms=[
            # The shorter side, 1024, times 0.5 to 2, in steps of 32.
            dict(
                type="torchvision.transforms.v2.RandomShortestSize",
                min_size=list(range(512, 2049, 32)),
                antialias=False,
            ),
            dict(type="RandomClassCrop", size=1024, cat_max_ratio=0.75),
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
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(type="Cityscapes", root=data_root, split="val", test_mode=True),
)
test_dataloader = val_dataloader
