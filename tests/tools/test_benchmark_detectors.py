"""Detectors that train on changing sizes in `linsight benchmark detectors`."""

import pytest

pytest.importorskip("mmdet", reason="mmdet is not installed: pip install linsight[det]")

from linsight.tools import benchmark_detectors as detectors

from .test_benchmark import rows, run
from .test_benchmark_cold import compile_one

MASK_RCNN = "mask_rcnn_rala_vit_nano_fpn_digits"


def test_sizes():
    sizes = detectors.draw_sizes(800, 240)
    assert sizes == detectors.draw_sizes(800, 300)[:240]
    assert {min(size) for size in sizes} == set(range(480, 801, 32))
    assert max(map(max, sizes)) == 1200
    assert any(height > width for height, width in sizes)
    assert len(set(sizes)) > 30


def test_training_at_changing_sizes(tmp_path, monkeypatch):
    """The backbone of timm that is made for one size takes them, too."""
    monkeypatch.setattr(detectors, "WARM_UP", 2)
    monkeypatch.setattr(detectors, "TIMED", 3)
    shapes = []
    learn = detectors.Detector.learn

    def learn_and_compile(detector):
        shapes.append(tuple(detector.batch["inputs"].shape[2:]))
        if len(shapes) in (1, 2, 4):
            compile_one(f"kernel{len(shapes)}")
        return learn(detector)

    monkeypatch.setattr(detectors.Detector, "learn", learn_and_compile)
    words = (MASK_RCNN, "--peer", "swin_tiny_patch4_window7_224", "--resolutions", "96")
    result = run(tmp_path, "detectors", *words, "--phases", "multi-scale")
    assert result.exit_code == 0, result.output
    own, peer = rows(tmp_path)
    assert [own["peer_of"], peer["peer_of"]] == ["", "MaskRCNN rala_vit_nano"]
    assert [own["compiled"], peer["compiled"]] == ["1", "0"]
    for row in (own, peer):
        assert (row["phase"], row["shape"], row["check"]) == ("multi-scale", "2 x 3 x 64..96", "ok")
        assert float(row["images_per_second"]) > 0
        assert float(row["first_call_s"]) > 0
        assert row["p50_ms"] == ""
    assert shapes[:6] == shapes[6:]  # five iterations and the check of the last loss
    assert len(set(shapes)) > 2


def test_programs_are_not_made_for_each_size(tmp_path):
    result = run(tmp_path, "detectors", MASK_RCNN, "--phases", "multi-scale", "--modes", "compile")
    assert result.exit_code == 2
    assert "nothing to measure" in result.output
