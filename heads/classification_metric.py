"""The accuracy of classification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from torch import Tensor


@METRICS.register_module()
class Accuracy(BaseMetric):
    """Share of images whose label is among the k highest scores, in percent.

    Args:
        topk: values of k; a k above 1 that is not below the number of classes is left out.
        collect_device: device on which the ranks' results are gathered, ``"cpu"`` or ``"gpu"``.
        prefix: prefix of the metrics' names, as in ``accuracy/top1``.
    """

    default_prefix = "accuracy"

    def __init__(
        self,
        topk: Sequence[int] = (1, 5),
        collect_device: str = "cpu",
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.topk = tuple(topk)

    @property
    def names(self) -> list[str]:
        """Names of the values, without the prefix."""
        classes = len((self.dataset_meta or {}).get("classes") or ())
        return [f"top{k}" for k in self.topk if k == 1 or not classes or k < classes]

    def process(self, data_batch: tuple[Tensor, Tensor], data_samples: Sequence[dict]) -> None:
        scores = torch.stack([sample["scores"] for sample in data_samples]).cpu()
        ks = [k for k in self.topk if k == 1 or k < scores.shape[1]]
        labels = data_batch[1].cpu()
        hits = scores.topk(max(ks)).indices == labels[:, None]
        self.results += [{k: bool(hit[:k].any()) for k in ks} for hit in hits]

    def compute_metrics(self, results: list[dict[int, bool]]) -> dict[str, float]:
        return {f"top{k}": 100 * sum(hit[k] for hit in results) / len(results) for k in results[0]}
