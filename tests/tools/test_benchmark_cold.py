"""`linsight benchmark cold` on a CPU, where nothing is compiled."""

import os
import sys
from pathlib import Path

import pytest
import torch

from linsight.kernels.runtime.private import get_cache_folder
from linsight.tools import benchmark_cold
from linsight.tools.benchmark_cold import ColdModel, ColdStart, Order
from linsight.tools.benchmark_timing import count_machine_codes, empty_caches

from .test_benchmark import rows, run

CPU = torch.device("cpu")


def compile_one(name: str) -> None:
    """Write what Triton writes beside a machine code."""
    folder = Path(get_cache_folder(), name)
    folder.mkdir(parents=True)
    (folder / f"{name}.cubin").touch()
    (folder / f"{name}.json").touch()
    (folder / f"__grp__{name}.json").touch()


def test_a_fresh_process(tmp_path):
    words = ("rala_vit_nano", "--resolutions", "32,64", "--phases", "training", "--batch", "3")
    result = run(tmp_path, "cold", *words)
    assert result.exit_code == 0, result.output
    got = rows(tmp_path)
    assert [(row["resolution"], row["batch"]) for row in got] == [("32", "3"), ("64", "3")]
    for row in got:
        assert (row["kind"], row["name"], row["peer_of"]) == ("cold", "rala_vit_nano", "")
        assert (row["mode"], row["phase"]) == ("eager", "training")
        assert row["check"] == "ok"
        assert row["compiled"] == "0"
        assert float(row["first_call_s"]) > 0
        assert float(row["p50_ms"]) > 0
        assert row["p20_ms"] == row["p80_ms"] == ""
    assert not list(tmp_path.glob("*.png"))


def test_a_resolution_that_fails_leaves_the_others():
    """Images of 8 pixels have no whole patch of 16."""
    order = Order("vit_tiny_patch16_224", None, [8, 32], 1, "float32", "cpu", "eager", "latency")
    start = ColdStart(order)
    assert start.measure(8)["check"].startswith("error: ")
    assert start.measure(32)["check"] == "ok"


def test_a_process_that_ends(monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho one line >&2\necho no context >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    words = ("rala_vit_nano", "--resolutions", "32,64", "--phases", "latency")
    result = run(tmp_path, "cold", *words)
    assert result.exit_code == 0, result.output
    reason = "error: RuntimeError: the process ended with 3: no context"
    assert [row["check"] for row in rows(tmp_path)] == [reason] * 2


def test_the_first_call_alone_counts(monkeypatch):
    """It is a step with the optimiser's; the second call is timed apart."""
    pytest.importorskip("triton")
    calls, times = [], [5.0, 0.25]
    learn = ColdModel.learn
    monkeypatch.setattr(
        benchmark_cold, "elapsed", lambda call, _: (call(), times[len(calls) - 1])[1]
    )

    def learn_and_compile(model):
        calls.append(0)
        for i in range(2 if len(calls) == 1 else 1):
            compile_one(f"kernel{len(calls)}{i}")
        return learn(model)

    monkeypatch.setattr(ColdModel, "learn", learn_and_compile)
    order = Order("test_convnext", None, [32], 2, "float32", "cpu", "eager", "training")
    with empty_caches():
        model = ColdModel(order.cases()[0], torch.float32, CPU, "eager", 0.0, "training")
    assert len(calls) == 2
    values = model.measure()
    assert values["compiled"] == 2
    assert (values["first_call_s"], values["p50_ms"]) == (5.0, 250.0)
    assert values["check"] == "ok"


def test_empty_caches(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    compile_one("before")
    assert count_machine_codes() == 1
    with empty_caches():
        assert count_machine_codes() == 0
        compile_one("within")
        assert count_machine_codes() == 1
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        assert folder.parent == Path(get_cache_folder()).parent
    assert not folder.parent.exists()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path)
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert count_machine_codes() == 1
