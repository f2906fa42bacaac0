"""Compare what a file computes with what its model computes, as each task's users see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor

from linsight.backbones.checkpoint import CheckpointError

Named = dict[str, Tensor]
# Objects are the same that have one label, overlap this much, and differ this little in score.
_OVERLAP, _SCORE = 0.9, 0.05


@dataclass(frozen=True)
class Limits:
    """How much a file may differ from its model.

    Attributes:
        logits: the largest relative L2 error of the logits.
        labels: the smallest share of pixels of the same label.
        objects: the smallest share of objects that are found again.
    """

    logits: float
    labels: float
    objects: float


EXACT = Limits(logits=1e-4, labels=0.999, objects=0.98)
# Half precision moves what lies on the edge between two classes, or two ranks.
HALF = Limits(logits=5e-2, labels=0.95, objects=0.9)
# Eight bits cost accuracy; what is beyond these limits is broken.
EIGHT = Limits(logits=0.5, labels=0.8, objects=0.5)


@dataclass(frozen=True)
class Difference:
    """What differs between a model's outputs and a file's, over all batches.

    Attributes:
        values: measured values by their names, for people to read.
        faults: what lies beyond the limits.
    """

    values: dict[str, float]
    faults: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in self.values.items())


def compare(
    model: Callable[[Tensor], Named],
    other: Callable[[Tensor], Named],
    batches: Sequence[Tensor],
    limits: Limits,
) -> Difference:
    """Run both on batches of images, and measure what differs.

    Boxes are compared by their overlap and score, masks by their overlap, labels of pixels by their
    share, logits by their relative L2 error.
    """
    with torch.inference_mode():
        pairs = [(model(images), other(images)) for images in batches]
    values: dict[str, float] = {}
    faults = [
        f"{name} holds NaN or infinity"
        for name in pairs[0][1]
        for _, found in pairs
        if not found[name].float().isfinite().all()
    ]
    if "boxes" in pairs[0][0]:
        images = [(_image(a, i), _image(b, i)) for a, b in pairs for i in range(len(a["boxes"]))]
        matches = [match_objects(a, b) for a, b in images]
        total = sum(m["objects"] for m in matches)
        # The other way round, an object that the file alone has is none that is found again.
        again = min(_share(matches), _share([match_objects(b, a) for a, b in images]))
        values |= {"objects": total, "share found again": again}
        values["least IoU"] = min(m["iou"] for m in matches)
        values["largest difference of scores"] = max(m["score"] for m in matches)
        if "masks" in pairs[0][0]:
            values["mean IoU of masks"] = sum(m["masks"] for m in matches) / len(matches)
            if values["mean IoU of masks"] < limits.objects:
                faults.append(f"masks overlap by {values['mean IoU of masks']:.3f} alone")
        if again < limits.objects:
            faults.append(f"{again:.1%} of the objects ({total} of the model) are found again")
        return Difference(values, tuple(faults))
    if "labels" in pairs[0][0]:
        same = min((a["labels"] == b["labels"]).float().mean().item() for a, b in pairs)
        values["share of pixels of the same label"] = same
        if same < limits.labels:
            faults.append(f"{same:.2%} of the pixels have the same label")
    if "logits" in pairs[0][0]:
        error = max(relative(b["logits"], a["logits"]) for a, b in pairs)
        values["relative error of the logits"] = error
        if pairs[0][0]["logits"].ndim == 2:
            same = [a["logits"].argmax(1) == b["logits"].argmax(1) for a, b in pairs]
            values["share of pictures of the same class"] = torch.cat(same).float().mean().item()
        if not error <= limits.logits:
            faults.append(f"the logits differ by {error:.1e}, more than {limits.logits:.0e}")
    return Difference(values, tuple(faults))


def refuse_faults(difference: Difference) -> None:
    """Raise a CheckpointError if a file differs too much."""
    if difference.faults:
        raise CheckpointError(
            f"the exported model differs from the model: {'; '.join(difference.faults)}; nothing "
            "was written"
        )


def relative(got: Tensor, wanted: Tensor) -> float:
    """The relative L2 error."""
    return ((got.float() - wanted).norm() / wanted.norm()).item()


def _image(outputs: Named, index: int) -> Named:
    there = outputs["labels"][index] >= 0
    return {name: value[index][there] for name, value in outputs.items()}


def _share(matches: Sequence[dict[str, Any]]) -> float:
    """The share of the objects of all images that are found again."""
    total = sum(m["objects"] for m in matches)
    return sum(m["found"] for m in matches) / total if total else 1.0


def match_objects(wanted: Named, found: Named) -> dict[str, Any]:
    """How many of the objects in an image are found again, and how well.

    Objects whose scores are close to the lowest are left out, as their order, by which some are
    kept and some are not, is rounding's luck.

    Args:
        wanted, found: ``boxes`` (N, 4), ``labels`` (N,), ``scores`` (N,) and maybe ``masks``.
    """
    result = {"objects": 0, "found": 0, "iou": 1.0, "score": 0.0, "masks": 1.0}
    if not len(wanted["scores"]):
        return result
    least = wanted["scores"].min() + 1e-3 if len(wanted["scores"]) > 1 else -1.0
    chosen = (wanted["scores"] > least).nonzero()[:, 0]
    result["objects"] = len(chosen)
    if not len(chosen):
        return result
    if not len(found["scores"]):
        return result | {"iou": 0.0, "score": 1.0, "masks": 0.0}
    overlaps = torchvision.ops.box_iou(wanted["boxes"][chosen], found["boxes"])
    score = (wanted["scores"][chosen, None] - found["scores"]).abs()
    same = wanted["labels"][chosen, None] == found["labels"]
    fits = same & (overlaps >= _OVERLAP) & (score <= _SCORE)
    again = fits.any(1)
    result["found"] = int(again.sum())
    if not again.any():
        return result | {"iou": 0.0, "score": 1.0, "masks": 0.0}
    closeness = torch.where(fits, overlaps - score, -1.0)
    best = closeness.argmax(1)[again]
    rows = again.nonzero()[:, 0]
    result["iou"] = overlaps[rows, best].min().item()
    result["score"] = score[rows, best].max().item()
    if "masks" in wanted:
        a, b = wanted["masks"][chosen[rows]], found["masks"][best]
        union = (a | b).flatten(1).sum(1)
        shares = (a & b).flatten(1).sum(1) / union.clamp(min=1)
        result["masks"] = shares[union > 0].mean().item() if (union > 0).any() else 1.0
    return result
