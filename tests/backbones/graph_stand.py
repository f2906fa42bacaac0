"""A stand-in for CUDA's recorder: it replays a call on the CPU by running it again.

It copies the results into those of the recording, as a graph writes to the memory that it was
recorded with, so that whatever relies on a result that a later replay overwrites goes wrong here,
too.
"""

import os
import random
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from linsight.backbones import graphs


class Stand:
    """Stands for `Recorder`, and counts."""

    device_type = "cpu"
    recorded = 0
    replayed = 0
    released = 0
    fails: str | None = None

    def __init__(self, device):
        self.device = device

    def rehearse(self, call, may_wait=False):
        call()

    def record(self, call, generators=()):
        Stand.recorded += 1
        if Stand.fails:
            raise RuntimeError(Stand.fails)
        grad, result = torch.is_grad_enabled(), call()

        def replay():
            Stand.replayed += 1
            graphs._Graphs.recording = True  # the module is called only as if it were recorded
            try:
                with torch.set_grad_enabled(grad):
                    again = call()
            finally:
                graphs._Graphs.recording = False
            for static, x in zip(result, again, strict=True):
                if static is not None:
                    static.detach().copy_(x.detach())

        return replay, result

    turn = staticmethod(nullcontext)

    @contextmanager
    def keep_random_state(self):
        state = random.getstate()
        try:
            with torch.random.fork_rng([]):
                yield
        finally:
            random.setstate(state)

    def host_state(self):
        return random.getstate()

    def recover(self):
        pass

    def release(self):
        Stand.released += 1


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the stand-in, with its counts at zero."""
    monkeypatch.setattr(graphs._Graphs, "make_recorder", Stand)
    for name in ("recorded", "replayed", "released", "fails"):
        monkeypatch.setattr(Stand, name, vars(Stand)[name])


def compare_two_processes(*options, **environment):
    """Run graphs_two_processes.py by torchrun; it compares graphs with the run without them."""
    script = Path(__file__).with_name("graphs_two_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    result = subprocess.run(
        [*command, str(script), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the same" in result.stdout
