"""COCO's average precision as mmdet computes it."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from importlib.util import find_spec
from typing import Any

from linsight.data.coco import fill_areas, index_annotations, read_annotations, remove_faulty

# isort: split
import mmdet.evaluation.metrics
from mmdet.evaluation import CocoMetric
from mmengine.fileio import get_local_path
from mmengine.registry import METRICS

_ITEMS = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")


def _fastest() -> type[CocoMetric]:
    """mmdet's metric, with the evaluation of faster-coco-eval if that package is installed.

    Upstream's mmdet 3.3.0 has no such class.
    """
    faster = getattr(mmdet.evaluation.metrics, "FasterCocoMetric", None)
    return faster if faster and find_spec("faster_coco_eval") else CocoMetric


@METRICS.register_module()
class QuietCocoMetric(_fastest()):
    """mmdet's ``CocoMetric`` without the tables that pycocotools prints.

    Where faster-coco-eval is installed its compiled evaluation runs, with the same figures. The
    same numbers are returned as metrics, such as ``coco/bbox_mAP``. Where the detector finds
    nothing in any image the precision is 0; mmdet's class returns no metric then. Of an annotation
    file the same annotations count as in
    :class:`~linsight.data.coco.CheckedCocoDataset`, which reports the others.
    """

    def __init__(self, ann_file: str | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(None, *args, **kwargs)
        if ann_file is not None:
            with get_local_path(ann_file, backend_args=self.backend_args) as path:
                content = read_annotations(str(path), evaluated=True, report=False)
            content.setdefault("annotations", [])
            remove_faulty(content, masks=False, shortest=0)
            fill_areas(content)
            self._coco_api = index_annotations(content)

    # The class of faster-coco-eval takes the truth from another key than mmdet's transforms write.
    process = CocoMetric.process

    @property
    def names(self) -> list[str]:
        """Names of the values, without the prefix; with ``classwise`` there are others."""
        items = self.metric_items or _ITEMS
        own = [f"{kind}_{item}" for kind in self.metrics for item in items]
        classes = (self.dataset_meta or {}).get("classes") or ()
        return own + [f"{name}_precision" for name in classes if self.classwise]

    def compute_metrics(self, results: list) -> dict[str, float]:
        with redirect_stdout(io.StringIO()):
            metrics = super().compute_metrics(results)
        first = (self.metric_items or _ITEMS)[0]
        return metrics or {f"{kind}_{first}": 0.0 for kind in self.metrics}
