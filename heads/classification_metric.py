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

    After an evaluation ``labels`` and ``guesses`` hold the label and the likeliest class of each
    image, in the main process.

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
        self.labels: list[int] = []
        self.guesses: list[int] = []

    @property
    def names(self) -> list[str]:
        """Names of the values, without the prefix."""
        classes = len((self.dataset_meta or {}).get("classes") or ())
        return [f"top{k}" for k in self.topk if k == 1 or not classes or k < classes]

    def process(self, data_batch: tuple[Tensor, Tensor], data_samples: Sequence[dict]) -> None:
        scores = torch.stack([sample["scores"] for sample in data_samples]).cpu()
        ks = [k for k in self.topk if k == 1 or k < scores.shape[1]]
        labels = data_batch[1].cpu()
        ranks = scores.topk(max(ks)).indices
        hits = ranks == labels[:, None]
        self.results += [
            ({k: bool(hit[:k].any()) for k in ks}, label, guess)
            for hit, label, guess in zip(hits, labels.tolist(), ranks[:, 0].tolist(), strict=True)
        ]

    def compute_metrics(self, results: list[tuple[dict[int, bool], int, int]]) -> dict[str, float]:
        hits, self.labels, self.guesses = map(list, zip(*results, strict=True))
        return {f"top{k}": 100 * sum(hit[k] for hit in hits) / len(hits) for k in hits[0]}
