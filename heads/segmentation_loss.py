"""Losses of semantic segmentation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class PixelCrossEntropy(nn.Module):
    """Cross-entropy of each pixel, averaged over all pixels of the batch.

    Ignored pixels count with a loss of zero, as in mmsegmentation, so that a batch without a
    labelled pixel has zero loss and gradients rather than NaN.

    Args:
        class_weight: factor of each class.
        ignore_index: label of pixels that belong to no class.
        hard_threshold: average over hard pixels alone (online hard example mining,
            arXiv:1604.03540), those whose class gets a probability below this threshold.
        min_kept: at least this many pixels per image, those of the highest loss, count as hard.

    Raises:
        ValueError: the threshold is no probability above 0.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        class_weight: Sequence[float] | None = None,
        ignore_index: int = 255,
        hard_threshold: float | None = None,
        min_kept: int = 100_000,
    ) -> None:
        super().__init__()
        if hard_threshold is not None and not 0 < hard_threshold <= 1:
            raise ValueError(f"hard_threshold is a probability above 0, got {hard_threshold}")
        weight = None if class_weight is None else torch.tensor(class_weight, dtype=torch.float32)
        self.register_buffer("class_weight", weight, persistent=False)
        self.ignore_index = ignore_index
        self.hard_threshold = hard_threshold
        self.min_kept = min_kept

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the scalar loss of logits (B, K, H, W) and labels (B, H, W)."""
        losses = F.cross_entropy(
            logits, labels, self.class_weight, ignore_index=self.ignore_index, reduction="none"
        )
        if self.hard_threshold is None:
            return losses.mean()
        with torch.no_grad():
            unweighted = losses
            if self.class_weight is not None:
                unweighted = F.cross_entropy(
                    logits, labels, ignore_index=self.ignore_index, reduction="none"
                )
            kept = min(self.min_kept * len(labels), labels.numel())
            least = unweighted.flatten().topk(kept).values[-1]
            hard = unweighted >= least.clamp(max=-math.log(self.hard_threshold))
            hard &= labels != self.ignore_index
        return (losses * hard).sum() / hard.sum().clamp(min=1)
