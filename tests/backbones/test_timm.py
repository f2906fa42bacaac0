"""timm's own model tests on the zoo's models, if TIMM_TESTS names a checkout of timm.

    git clone --branch v1.0.31 <timm's repository> timm
    TIMM_TESTS=timm pytest tests/backbones/test_timm.py

TorchScript is left out: the operators choose their kernel by the device and the process's
setting, and are registered with `torch.library`, neither of which `torch.jit.script` compiles;
PyTorch has deprecated it in favour of `torch.export`, which tests/backbones/test_export.py covers.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = os.environ.get("TIMM_TESTS")


@pytest.mark.skipif(not CHECKOUT, reason="TIMM_TESTS does not name a checkout of timm")
def test_timm_models():
    tests = Path(CHECKOUT).resolve() / "tests" / "test_models.py"
    if not tests.is_file():
        raise FileNotFoundError(f"TIMM_TESTS is {CHECKOUT!r}, but {tests} does not exist")
    command = [sys.executable, "-m", "pytest", str(tests), "-p", "timm_plugin"]
    command += ["-k", "not torchscript", "-q"]
    run = subprocess.run(
        command,
        # timm's tests are a package called tests, too, so this one must not be on the path.
        cwd=tests.parents[1],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    print(run.stdout[-4000:])
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
