# Boxes of COCO 2017 at many scales, as DINO's and DETR's code has them: before the crop the longer
# side has no bound.
_base_ = ["coco_detection.py", "multi_scale.py"]

unbounded = _base_.multi_scale
unbounded.transforms[1][0].scales = [(side, 4200) for side in (400, 500, 600)]

train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True),
            dict(type="RandomFlip", prob=0.5),
            unbounded,
            dict(type="PackDetInputs"),
        ]
    )
)
