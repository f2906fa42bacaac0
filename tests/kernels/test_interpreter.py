"""Without a GPU: the Triton tests of this folder, under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from linsight.kernels.runtime.dispatch import HAS_TRITON

from .conftest import DEVICE, INTERPRETED


@pytest.mark.skipif(INTERPRETED or DEVICE.type == "cuda", reason="the tests run here themselves")
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_under_the_interpreter(seed: int) -> None:
    # The interpreter is chosen when Triton is imported, and then holds for the whole process.
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-m", "triton", "-x", f"--random-seed={seed}"),
            str(Path(__file__).parent),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
