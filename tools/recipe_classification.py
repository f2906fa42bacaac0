"""What a user's classifier is trained with: the model, its data sets and their augmentation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from linsight.data.sources import class_counts, class_weights, folder_of
from linsight.tools.config import ConfigError

if TYPE_CHECKING:
    from linsight.tools.recipe import Recipe


def classification(recipe: Recipe) -> dict[str, Any]:
    """The model, the data loaders and the evaluator of a classifier."""
    s = recipe.source
    model: dict[str, Any] = {
        "type": "ImageClassifier",
        "backbone": recipe.backbone(),
        "num_classes": len(s.classes),
        "label_smoothing": 0.1,
    }
    if recipe.wishes.class_weights:
        counts = class_counts(s, "train")
        if not s.splits:
            raise ConfigError("--class-weights counts images, which Hugging Face data sets hide")
        weights = class_weights(counts)
        model["loss"] = {"type": "torch.nn.CrossEntropyLoss", "weight": weights}
    prepared = {k: v for k, v in recipe.start.preparation.items() if k != "crop_pct"}
    augmented = {
        "input_size": recipe.size,
        "is_training": True,
        "scale": (0.6, 1.0) if recipe.whole else (0.35, 1.0),
        "color_jitter": 0.3,
        "auto_augment": None if recipe.whole else "rand-m5-n2-mstd0.5-inc1",
        "re_prob": 0.1,
        "re_mode": "pixel",
        **prepared,
    }
    plain = {"input_size": recipe.size, "crop_pct": 1.0, **prepared}
    if not s.splits:
        sets = {
            split: {
                "type": "TimmDataset",
                "root": str(Path.home() / ".cache" / "huggingface" / "datasets"),
                **arguments,
                "transform": augmented if split == "train" else plain,
            }
            for split, arguments in s.reader.items()
        }
    else:
        sets = {
            split: {
                "type": "TimmDataset",
                "root": str(folder_of(s)),
                "annotations": file,
                "classes": s.classes,
                "transform": augmented if split == "train" else plain,
            }
            for split, file in recipe.lists.items()
        }
    loaders = recipe.loaders(sets, sets, "default_collate", recipe.batch)
    return {"model": model, **loaders, "evaluator": recipe.task.evaluator}
