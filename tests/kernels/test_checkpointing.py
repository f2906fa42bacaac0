"""Gradient checkpointing, which gives what a backward pass reads back once, and no second time."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from linsight.kernels import force
from linsight.kernels.focused_linear_attention import focused_linear_attention
from linsight.kernels.linear_attention import linear_attention
from linsight.kernels.polarity_attention import polarity_attention
from linsight.kernels.window_attention import window_attention


def focus(x):
    q, k, v, scale, local = x
    return focused_linear_attention(q, k, v, scale[0, 0].flatten().square() + 1, local=local)


def attend(x):
    q, k, v, local, gate = x
    return linear_attention(q, k, v, local=local, gate=gate)


def attend_by_signs(x):
    q, k, v, local, gate = x
    power, scale = x[:2, 0, 0].square() + 1
    return polarity_attention(q, k, v, power, scale, local=local, gate=gate)


def attend_in_windows(x):
    projection = x[:3].permute(1, 2, 0, 3, 4).reshape(2, 2, 3, 48)
    return window_attention(projection, heads=2, windows=[(2, 2)])


@pytest.mark.triton
@pytest.mark.parametrize("function", [focus, attend, attend_by_signs, attend_in_windows])
def test_a_checkpoint_has_the_same_gradient(function, device) -> None:
    x = torch.randn(5, 2, 6, 2, 8, device=device, requires_grad=True)
    with force("triton"):
        y = checkpoint(function, x, use_reentrant=False)
        (recomputed,) = torch.autograd.grad(y.square().sum(), x)
        (expected,) = torch.autograd.grad(function(x).square().sum(), x)
    assert torch.equal(recomputed, expected)
