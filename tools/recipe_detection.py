"""What a user's detector is trained with: the model, its data sets and their augmentation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from mmengine.config import Config

from linsight.data.sources import folder_of
from linsight.tools.config import CONFIGS, ConfigError, quiet_mmdet
from linsight.tools.recipe_objects import Objects

if TYPE_CHECKING:
    from linsight.tools.recipe import Recipe


def detection(recipe: Recipe) -> dict[str, Any]:
    """The model, the data loaders and the evaluator of a detector."""
    s = recipe.source
    plain = recipe.plain
    instances = s.task == "instances"
    base = "mask_rcnn_fpn.py" if instances else "retinanet_fpn.py"
    with quiet_mmdet():
        model = Config.fromfile(CONFIGS / "_base_" / "models" / base).model.to_dict()
    levels = {} if instances or plain else {"out_indices": (1, 2, 3)}
    if plain:
        first = 4 if instances else 8
        strides = tuple(first * 2**i for i in range(5))
        model["neck"] = {
            "type": "SimpleFeaturePyramid",
            "out_channels": 256,
            "strides": strides,
        }
    model["backbone"] = {
        "type": "TimmBackbone",
        **recipe.backbone(),
        **levels,
        "output_norm_eps": 1e-6,
    }
    count = len(s.classes)
    if instances:
        model["roi_head"]["bbox_head"]["num_classes"] = count
        model["roi_head"]["mask_head"]["num_classes"] = count
    else:
        model["bbox_head"]["num_classes"] = count
    if recipe.wishes.class_weights:
        raise ConfigError("--class-weights is for classifiers and segmentors")
    objects = cast(Objects, recipe.objects)
    objects.adapt(model, recipe.seen())
    mean, std = (recipe.start.preparation.get(k) for k in ("mean", "std"))
    if mean and std:
        model["data_preprocessor"]["mean"] = [round(255 * v, 3) for v in mean]
        model["data_preprocessor"]["std"] = [round(255 * v, 3) for v in std]
    load = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "with_bbox": True, "with_mask": instances},
    ]
    keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    factors = (0.75, 1.0, 1.25)
    if recipe.crop:
        resized = [[{"type": "Resize", "scale_factor": f, "keep_ratio": True}] for f in factors]
        view: list[dict[str, Any]] = [
            {"type": "RandomChoice", "transforms": resized},
            {
                "type": "RandomCrop",
                "crop_size": (recipe.crop, recipe.crop),
                "allow_negative_crop": True,
            },
            # A few large pictures: each has a light of its own, which is no mark of the objects.
            {"type": "PhotoMetricDistortion"},
        ]
        resize: dict[str, Any] = {"scale_factor": 1.0}
    else:
        long = recipe.long()
        scales = [(long, round(recipe.size * f / 32) * 32) for f in factors]
        view = [{"type": "RandomChoiceResize", "scales": scales, "keep_ratio": True}]
        resize = {"scale": (long, recipe.size)}
    train = [*load, *view, {"type": "RandomFlip", "prob": 0.5}, {"type": "PackDetInputs"}]
    test = [
        load[0],
        {"type": "Resize", **resize, "keep_ratio": True},
        load[1],
        {"type": "PackDetInputs", "meta_keys": keys},
    ]

    def dataset(file: str, training: bool) -> dict[str, Any]:
        return {
            "type": "CheckedCocoDataset",
            "ann_file": file,
            "data_root": "",
            "data_prefix": {"img": f"{folder_of(s)}/"},
            "metainfo": {"classes": tuple(s.classes)},
            **({} if recipe.report.upright else {"upright": False}),
            "test_mode": not training,
            "pipeline": train if training else test,
        }

    sets = {split: dataset(file, split == "train") for split, file in recipe.lists.items()}
    if recipe.repeats > 1:
        repeated = {"type": "RepeatDataset", "times": recipe.repeats, "dataset": sets["train"]}
        sets["train"] = repeated
    loaders = recipe.loaders(sets, sets, "pseudo_collate", 1)
    evaluator = {**recipe.task.evaluator, "metric": ["bbox", "segm"] if instances else "bbox"}
    if recipe.crowded:
        evaluator["proposal_nums"] = (100, 300, max(1000, objects.kept))
        evaluator["metric_items"] = ["mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l"]
    return {"model": model, **loaders, "evaluator": evaluator}
