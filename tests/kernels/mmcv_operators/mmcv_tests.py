"""mmcv's own tests of the operators in the table, when MMCV_TESTS names a checkout of mmcv.

    git clone <mmcv's repository> mmcv
    MMCV_TESTS=mmcv python tests/kernels/mmcv_operators/mmcv_tests.py

Those that need CUDA run where there is a GPU. All run, whatever fails; a table at the end counts
them by file and device and names each that failed. Further arguments go to pytest. The installed
mmcv is what is tested, of any version; its checkout gives only the tests and their data.

None is known that cannot pass (mmcv's tests of January 2026 under onedl-mmcv 2.3.6; an older mmcv
cannot import them, and wants those of its own version). A dozen return at once without CUDA, and
are counted with those that need it. Other accelerators are MLU, MUSA, NPU and MPS.

Left out, because the operators are not in the table (mmdet's models do not call them):
test_active_rotated_filter, test_assign_score_withk, test_ball_query, test_bezier_align,
test_bias_act, test_border_align, test_box_iou_quadri, test_box_iou_rotated,
test_chamfer_distance, test_contour_expand, test_convex_iou, test_correlation,
test_diff_iou_rotated, test_filtered_lrelu, test_furthest_point_sample,
test_fused_bias_leakyrelu, test_gather_points, test_group_points, test_iou3d, test_knn,
test_min_area_polygons, test_nms_quadri, test_nms_rotated, test_pixel_group,
test_points_in_polygons, test_prroi_pool, test_psa_mask, test_riroi_align_rotated,
test_roi_align_rotated, test_roiaware_pool3d, test_roipoint_pool3d, test_rotated_feature_align,
test_scatter_points, test_spconv, test_syncbn, test_three_interpolate, test_three_nn,
test_tin_shift, test_upfirdn2d, test_voxelization. And test_onnx, which exports through
TorchScript.
"""

import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table

import linsight.kernels.mmcv_operators  # noqa: F401  before mmcv: puts the table in place

TESTED = (
    "bbox",
    "bilinear_grid_sample",
    "carafe",
    "cc_attention",
    "conv_gradfix",
    "corner_pool",
    "deform_conv",
    "deform_roi_pool",
    "focal_loss",
    "info",
    "masked_conv2d",
    "merge_cells",
    "modulated_deform_conv",
    "ms_deformable_attn",
    "nms",
    "roi_align",
    "roi_pool",
    "saconv",
)

# They pass without CUDA because they do nothing then.
EMPTY_WITHOUT_CUDA = (
    "test_carafe_naive_gradcheck",
    "test_carafe_gradcheck",
    "test_deform_roi_pool_gradcheck",
    "test_modulated_deform_roi_pool_gradcheck",
    "test_softmax_float",
    "test_softmax_half",
    "test_grad_softmax_float",
    "test_grad_sigmoid_float",
    "test_info",
    "test_softnms_allclose",
    "test_nms_match",
    "test_roipool_gradcheck",
)


class Summary:
    """A pytest plugin that counts outcomes by file and device."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.failed: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._count(report, "failed")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when != "call":
            return
        test = report.nodeid.rpartition("::")[2]
        # Their skips name CUDA as "requires CUDA support", "requires cuda" or "test requires GPU".
        needs_cuda = re.search("cuda|gpu", str(report.longrepr), re.I) if report.skipped else None
        if report.failed:
            self._count(report, "failed")
        elif report.skipped and not needs_cuda:
            self._count(report, "other accelerators")
        elif report.skipped or (test in EMPTY_WITHOUT_CUDA and not torch.cuda.is_available()):
            self._count(report, "needs CUDA")
        else:
            self._count(report, "passed, CUDA" if "cuda" in test else "passed")

    def _count(self, report: pytest.TestReport | pytest.CollectReport, outcome: str) -> None:
        name = Path(report.nodeid.partition("::")[0]).stem.removeprefix("test_")
        self.counts.setdefault(name, Counter())[outcome] += 1
        if outcome == "failed":
            self.failed.append(f"{report.nodeid}: {_error(report)}")

    def show(self) -> None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        outcomes = ["passed", "passed, CUDA", "failed", "needs CUDA", "other accelerators"]
        table = Table("file", *outcomes, title=f"mmcv's own tests on the operator table, {device}")
        total: Counter[str] = sum(self.counts.values(), Counter())
        for name, counts in [*sorted(self.counts.items()), ("all", total)]:
            table.add_row(name, *(str(counts[outcome] or "") for outcome in outcomes))
        console = Console(width=100)
        console.print(table)
        for line in self.failed:
            console.print(f"failed: {line}", markup=False, highlight=False)


def _error(report: pytest.TestReport | pytest.CollectReport) -> str:
    lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
    return lines[0][1:].strip() if lines else "see above"


def main(arguments: list[str]) -> int:
    """Run them, and give pytest's exit status."""
    checkout = os.environ.get("MMCV_TESTS")
    if not checkout:
        raise SystemExit("set MMCV_TESTS to a checkout of mmcv, whose tests are to be run")
    root = Path(checkout).resolve()
    files = [root / "tests" / "test_ops" / f"test_{name}.py" for name in TESTED]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise SystemExit(f"MMCV_TESTS is {checkout!r}, but these do not exist: {missing}")
    # The tests' data have paths relative to the checkout, which must not itself be imported as
    # mmcv, nor be written to.
    os.chdir(root)
    options = ["-q", "--tb=short", "--import-mode=importlib", "-p", "no:cacheprovider"]
    options.append("--continue-on-collection-errors")
    summary = Summary()
    status = pytest.main([*options, *map(str, files), *arguments], plugins=[summary])
    summary.show()
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
