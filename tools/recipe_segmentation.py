"""What a user's segmentor is trained with: the model, its data sets and their augmentation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linsight.data.sources import class_weights, folder_of

if TYPE_CHECKING:
    from linsight.tools.recipe import Recipe


def segmentation(recipe: Recipe) -> dict[str, Any]:
    """The model, the data loaders and the evaluator of a segmentor."""
    s = recipe.source
    model: dict[str, Any] = {
        "type": "SemanticSegmentor",
        "backbone": {**recipe.backbone(), "output_norm_eps": 1e-6},
        "decode_head": {"type": "SegformerHead", "channels": 256},
        "num_classes": len(s.classes),
    }
    if recipe.plain:
        model["neck"] = {"type": "SimpleFeaturePyramid", "out_channels": 256}
    if recipe.wishes.class_weights:
        weights = class_weights(recipe.report.counts["train"])
        model["loss"] = {"type": "PixelCrossEntropy", "class_weight": weights}
    place = "torchvision.transforms.v2"
    train = [
        {"type": "RandomClassCrop", "size": recipe.size, "cat_max_ratio": 0.75},
        {"type": f"{place}.RandomHorizontalFlip"},
        {"type": "PhotometricDistortion"},
    ]
    statistics = {
        k: recipe.start.preparation[k] for k in ("mean", "std") if k in recipe.start.preparation
    }

    def dataset(file: str, training: bool) -> dict[str, Any]:
        return {
            "type": "SegmentationFolder",
            "root": str(folder_of(s)),
            "annotations": file,
            "classes": s.classes,
            "label_map": s.label_map,
            **({} if recipe.report.upright else {"upright": False}),
            **statistics,
            **({"transforms": train} if training else {"test_mode": True}),
        }

    sets = {split: dataset(file, split == "train") for split, file in recipe.lists.items()}
    # Images of several sizes do not stack.
    loaders = recipe.loaders(sets, sets, "default_collate", 1)
    return {"model": model, **loaders, "evaluator": recipe.task.evaluator}
