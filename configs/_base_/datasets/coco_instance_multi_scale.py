# COCO 2017's boxes and masks at many scales, as DETR draws them (arXiv:2005.12872): the shorter
# side 480 to 800 pixels, for half of the images after a random crop.
_base_ = "coco_instance.py"

train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
            dict(type="RandomFlip", prob=0.5),
            dict(
                type="RandomChoice",
                transforms=[
                    [
                        dict(
                            type="RandomChoiceResize",
                            scales=[(side, 1333) for side in range(480, 801, 32)],
                            keep_ratio=True,
                        )
                    ],
                    [
                        dict(
                            type="RandomChoiceResize",
                            scales=[(side, 1333) for side in (400, 500, 600)],
                            keep_ratio=True,
                        ),
                        dict(
                            type="RandomCrop",
                            crop_type="absolute_range",
                            crop_size=(384, 600),
                            allow_negative_crop=True,
                        ),
                        dict(
                            type="RandomChoiceResize",
                            scales=[(side, 1333) for side in range(480, 801, 32)],
                            keep_ratio=True,
                        ),
                    ],
                ],
            ),
            dict(type="PackDetInputs"),
        ]
    )
)
