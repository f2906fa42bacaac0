"""One step of the measurement; several processes are those of test_many_processes.py."""

import queue

import timm
import torch
import typer
from typer.testing import CliRunner

from linsight.tools.benchmark_scaling import Setting, build_step, measure, scaling

SETTING = Setting("test_resnet", batch=2, resolution=32, bucket_mib=25, seconds=0.01)


def test_a_rate_is_measured():
    rates = queue.SimpleQueue()
    measure(0, 1, 0, "eager", SETTING, rates)
    rate, memory = rates.get()
    assert rate > 0
    assert memory == 0


def test_a_step_trains(monkeypatch):
    model = timm.create_model("test_resnet", num_classes=1000)
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: model)
    step = build_step(SETTING, "eager", torch.device("cpu"), 1)
    before = model.fc.weight.clone()
    step()
    assert not torch.equal(before, model.fc.weight)
    assert model.fc.weight.grad is None


def test_a_mode_that_is_none():
    app = typer.Typer()
    app.command()(scaling)
    result = CliRunner().invoke(app, ["--modes", "eagre"])
    assert result.exit_code == 2
    assert "eagre, expected eager, captured, compile" in " ".join(result.output.split())
