"""Convolutions with bias and activation in one more pass."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linsight.kernels import conv2d, force

from .conftest import INTERPRETED, compiled
from .numerics import RESULT, ROUNDINGS, distance


def drawn(batch, inputs, outputs, kernel, size, device, dtype=torch.float32) -> list[Tensor]:
    x = torch.randn(batch, inputs, *size, device=device).to(memory_format=torch.channels_last)
    weight = torch.randn(outputs, inputs, kernel, kernel, device=device)
    bias = 4 * torch.randn(outputs, device=device)
    return [t.to(dtype) for t in (x, weight, bias)]


def assert_as_exact_as_eager(tensors: list[Tensor], **options) -> None:
    """In inference: the error against float64 at most twice that of PyTorch's own operators."""
    with torch.inference_mode():
        exact = conv2d(*(t.double() for t in tensors), **options)
        with force("reference"):
            eager = conv2d(*tensors, **options)
        with force("triton"):
            ours = conv2d(*tensors, **options)
    assert ours.dtype == eager.dtype
    assert ours.is_contiguous(memory_format=torch.channels_last)
    # Under the interpreter bfloat16 is rounded towards zero.
    slack = 2.0 if INTERPRETED and ours.dtype == torch.bfloat16 else 1.0
    floor = ROUNDINGS[ours.dtype] * torch.finfo(ours.dtype).eps
    assert distance(ours, exact) <= slack * RESULT * max(distance(eager, exact), floor)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "gelu", "relu"])
def test_error_against_float64(dtype, activation, device, seed) -> None:
    tensors = drawn(2, 3, 32, 3, (9, 14), device, dtype)
    assert_as_exact_as_eager(tensors, stride=2, padding=1, activation=activation)


@pytest.mark.triton
def test_random_shapes(random_cases, device, seed) -> None:
    draw = random.Random(seed)
    for _ in random_cases:
        size, kernel = (draw.choice((3, 5, 12)), draw.choice((4, 7))), draw.choice((1, 2, 3))
        batch, inputs, outputs = draw.choice((1, 3)), draw.choice((1, 3)), draw.choice((1, 7, 96))
        print(size, kernel, batch, inputs, outputs)
        tensors = drawn(batch, inputs, outputs, kernel, size, device)
        stride, padding = draw.choice((1, 2)), draw.choice((0, 1))
        activation = draw.choice((None, "gelu", "relu"))
        assert_as_exact_as_eager(tensors, stride=stride, padding=padding, activation=activation)


@pytest.mark.triton
def test_large_values_and_zeros(device) -> None:
    x, weight, _ = drawn(1, 2, 8, 1, (3, 4), device)
    bias = torch.tensor([-20.0, -7.0, -1e-3, 0.0, 0.0, 1e-3, 7.0, 20.0], device=device)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [t.to(dtype) for t in (x * 0, weight, bias)]
        assert_as_exact_as_eager(tensors, activation="gelu")


@pytest.mark.triton
def test_a_channels_first_map(device) -> None:
    x, weight, bias = drawn(2, 3, 4, 3, (5, 6), device)
    x, weight = x.contiguous(), weight.contiguous()
    with torch.no_grad(), force("triton"):
        found = conv2d(x, weight, bias, padding=1, activation="gelu")
    torch.testing.assert_close(found, F.gelu(F.conv2d(x, weight, bias, padding=1)))


@pytest.mark.triton
def test_a_gradient_is_pytorchs(device) -> None:
    tensors = [t.requires_grad_() for t in drawn(1, 2, 3, 3, (4, 5), device)]
    with force("triton"):
        found = torch.autograd.grad(conv2d(*tensors, activation="gelu").sum(), tensors)
    wanted = torch.autograd.grad(F.gelu(F.conv2d(*tensors)).sum(), tensors)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.triton
def test_compiles_without_a_graph_break(device) -> None:
    _, weight, bias = drawn(1, 3, 8, 3, (4, 4), device)
    whole = compiled(conv2d)
    for size in ((4, 6), (7, 5), (9, 9)):
        x = drawn(1, 3, 8, 3, size, device)[0]
        with torch.no_grad(), force("triton"):
            options = {"stride": 2, "padding": 1, "activation": "gelu"}
            torch.testing.assert_close(
                whole(x, weight, bias, **options), conv2d(x, weight, bias, **options)
            )


def test_another_activation_is_refused(device) -> None:
    with pytest.raises(ValueError, match="activation is 'silu', expected None, 'gelu'"):
        conv2d(*drawn(1, 1, 1, 1, (2, 2), device), activation="silu")
