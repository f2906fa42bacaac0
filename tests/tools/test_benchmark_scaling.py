"""One step of the measurement; several processes are those of test_many_processes.py."""

import queue

import pytest
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
    step, built = build_step(SETTING, "eager", torch.device("cpu"), 1)
    assert built is model
    before = model.fc.weight.clone()
    step()
    assert not torch.equal(before, model.fc.weight)
    assert model.fc.weight.grad is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--modes", "eagre"], "eagre, expected eager, captured, compile"),
        (["--modes", "captured"], "captured needs a GPU"),
        (["--counts", "0"], "--counts is '0', expected numbers"),
        (["--counts", "1;2"], "--counts is '1;2', expected numbers"),
        (["--batch", "0"], "greater than or equal to 1"),
        (["rala_vit_smal"], "timm has no model 'rala_vit_smal'"),
    ],
)
def test_mistakes_are_named(words, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.multiprocessing, "spawn", None)
    app = typer.Typer()
    app.command()(scaling)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", "").split())
