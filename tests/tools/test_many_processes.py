"""Several processes train as one does, whole or sharded, and go on after a kill.

They run on the CPU through gloo.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the trainings are forked")
def test_trainings_in_several_processes_end_alike(tmp_path):
    script = Path(__file__).with_name("many_processes.py")
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all trainings end alike" in result.stdout
