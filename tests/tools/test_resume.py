"""Killed by SIGKILL at any moment and resumed, a training ends as if nothing had happened.

It runs on the CPU, where every sum has one order.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the drill forks")
@pytest.mark.parametrize(
    ("least", "seconds"), [("3", "6"), pytest.param("6", "25", marks=pytest.mark.slow)]
)
def test_killed_trainings_end_bit_for_bit_alike(tiny, least, seconds):
    drill = Path(__file__).with_name("resume_drill.py")
    result = subprocess.run(
        [sys.executable, str(drill), str(tiny), least, seconds],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "end alike" in result.stdout
