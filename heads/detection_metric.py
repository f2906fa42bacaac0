"""COCO's average precision as mmdet computes it."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

from mmdet.evaluation import CocoMetric
from mmengine.registry import METRICS


@METRICS.register_module()
class QuietCocoMetric(CocoMetric):
    """mmdet's ``CocoMetric`` without the tables that pycocotools prints.

    The same numbers are returned as metrics, such as ``coco/bbox_mAP``. Where the detector finds
    nothing in any image the precision is 0; mmdet's class returns no metric then.
    """

    def compute_metrics(self, results: list) -> dict[str, float]:
        with redirect_stdout(io.StringIO()):
            metrics = super().compute_metrics(results)
        return metrics or {f"{kind}_mAP": 0.0 for kind in self.metrics}
