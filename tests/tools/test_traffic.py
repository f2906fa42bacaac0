"""What a pass moves, counted without a GPU."""

import pytest
import timm
import typer
from torch import nn
from typer.testing import CliRunner

from linsight.kernels.runtime.dispatch import HAS_TRITON
from linsight.tools.traffic import count_traffic, main

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


class Two(nn.Module):
    """A linear layer and a GELU."""

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 8, 8)}
        self.fc = nn.Linear(8, 16, bias=False)

    def forward(self, x):
        return nn.functional.gelu(self.fc(x))


def test_bytes_are_those_of_the_tensors(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda name: Two())
    traffic = count_traffic("two", batch_size=2, dtype=None)
    rows = 2 * 3 * 8
    assert traffic.moved == {
        "aten::mm": 4 * (rows * 8 + 8 * 16 + rows * 16),
        "aten::gelu": 4 * 2 * rows * 16,
    }
    assert traffic.calls == {"aten::mm": 1, "aten::gelu": 1}
    narrow = count_traffic("two", batch_size=2)
    assert narrow.moved["aten::gelu"] == traffic.moved["aten::gelu"] // 2
    assert narrow.calls["aten::_to_copy"] == 2  # the images and the weight


def test_kernels_are_counted_by_name():
    traffic = count_traffic("rala_vit_nano", training=True, batch_size=2, side=32)
    assert traffic.calls["linear_attention.state"] > 0
    assert traffic.calls["linear_attention.key_gradient"] > 0
    assert not any(name.startswith("prim") for name in traffic.calls)
    attention = "aten::_scaled_dot_product_flash_attention"
    assert traffic.calls[attention] == traffic.calls[f"{attention}_backward"] > 0


def test_the_table():
    app = typer.Typer()
    app.command()(main)
    done = CliRunner().invoke(app, ["rala_vit_nano", "--batch-size", "2", "--resolution", "32"])
    assert done.exit_code == 0, done.output
    assert "linear_attention.read" in done.output
