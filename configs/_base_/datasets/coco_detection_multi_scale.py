# Boxes of COCO 2017 at many scales.
_base_ = ["coco_detection.py", "multi_scale.py"]

train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True),
            dict(type="RandomFlip", prob=0.5),
            _base_.multi_scale,
            dict(type="PackDetInputs"),
        ]
    )
)
