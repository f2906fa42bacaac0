"""mmcv's own tests of the operators in the table, when MMCV_TESTS names a checkout of mmcv.

    git clone <mmcv's repository> mmcv
    MMCV_TESTS=mmcv python tests/kernels/mmcv_operators/mmcv_tests.py

Those that need CUDA skip themselves without it. Further arguments go to pytest. The installed
mmcv is what is tested, of any version; its checkout gives only the tests and their data.

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
import subprocess
import sys
from pathlib import Path

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
    # Importing linsight, as a pytest plugin, puts the table in place. The tests' data have
    # paths relative to the checkout, which must not itself be imported as mmcv.
    command = [sys.executable, "-P", "-m", "pytest", "-p", "linsight", "-q", "-rs"]
    command += ["--import-mode=importlib", *map(str, files), *arguments]
    return subprocess.run(command, cwd=root, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
