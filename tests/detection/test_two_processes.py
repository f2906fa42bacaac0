"""Two processes train as one does with twice the batch, through mmengine's launcher."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet", reason="mmdet is not installed: pip install linsight[det]")


@pytest.mark.slow
def test_losses_are_the_same():
    script = Path(__file__).with_name("two_processes.py")
    environment = dict(os.environ)
    if torch.cuda.device_count() < 2:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    result = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "20 steps" in result.stdout
