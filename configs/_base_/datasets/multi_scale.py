# Many scales, as in DETR (arXiv:2005.12872): the shorter side has 480 to 800 pixels. Half of the
# images are cropped at random before.
multi_scale = dict(
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
)
