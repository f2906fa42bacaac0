"""A detector's training, killed and resumed, ends as if nothing had happened, on the CPU.

This holds under upstream mmengine 0.10.7, too, which by itself cannot resume on torch 2.6 or newer.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="mmdet is not installed: pip install linsight[det]")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the drill forks")
@pytest.mark.slow
def test_killed_trainings_end_bit_for_bit_alike(tiny):
    drill = Path(__file__).parents[1] / "tools" / "resume_drill.py"
    result = subprocess.run(
        [sys.executable, str(drill), str(tiny), "2", "0"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 killed trainings" in result.stdout
