# ADE20K: the unpacked ADEChallengeData2016 of the scene parsing benchmark.
_base_ = "semantic_crops.py"

data_root = "data/ade/ADEChallengeData2016"

train_dataloader = dict(
    # Per GPU. The recipes use a batch of 16 in total, 2 on each of 8 GPUs.
    batch_size=2,
    dataset=dict(
        type="ADE20K",
        root=data_root,
        split="training",
        transforms=[
            # Resize the shorter side to 512 times 0.5 to 2, in steps of 16.
            dict(
                type="torchvision.transforms.v2.RandomShortestSize",
                min_size=list(range(256, 1025, 16)),
                antialias=False,
            ),
            dict(type="RandomClassCrop", size=512, cat_max_ratio=0.75),
            dict(type="torchvision.transforms.v2.RandomHorizontalFlip", p=0.5),
            dict(type="PhotometricDistortion"),
        ],
    ),
)
val_dataloader = dict(
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
