"""The optimisers that recipes name."""

import timm.optim
import torch
from torch import nn

from linsight.heads import optim  # noqa: F401 (registers nmuon32)


def update(name: str) -> torch.Tensor:
    """What one step of the optimiser called `name` adds to a matrix."""
    layer = nn.Linear(24, 16, bias=False)
    before = layer.weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    layer.weight.grad = torch.randn(16, 24, generator=generator)
    timm.optim.create_optimizer_v2(layer, opt=name, lr=0.1, weight_decay=0.0).step()
    return layer.weight.detach() - before


def test_muon_in_float32_makes_timms_step():
    update32, update16 = update("nmuon32"), update("nmuon")
    error = (update32 - update16).norm() / update32.norm()
    assert 0 < error < 0.02, "bfloat16 has 8 bits"
