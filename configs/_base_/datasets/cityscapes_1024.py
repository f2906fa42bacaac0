# Cityscapes with leftImg8bit/ and gtFine/, as downloaded.
_base_ = "semantic_crops.py"

data_root = "data/cityscapes"

train_dataloader = dict(
    # Per GPU; 8 in total on 8 GPUs.
    batch_size=1,
    dataset=dict(
        type="Cityscapes",
        root=data_root,
        split="train",
        transforms=[
            # Resize the shorter side, 1024, by 0.5 to 2, in steps of 32.
            dict(
                type="torchvision.transforms.v2.RandomShortestSize",
                min_size=list(range(512, 2049, 32)),
                antialias=False,
            ),
            dict(type="RandomClassCrop", size=1024, cat_max_ratio=0.75),
            dict(type="torchvision.transforms.v2.RandomHorizontalFlip", p=0.5),
            dict(type="PhotometricDistortion"),
        ],
    ),
)
val_dataloader = dict(dataset=dict(type="Cityscapes", root=data_root, split="val", test_mode=True))
test_dataloader = val_dataloader
