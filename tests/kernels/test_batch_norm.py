"""Batch norm in training: the reference against PyTorch's module, Triton against both."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linsight.kernels import force
from linsight.kernels.batch_norm import batch_norm

from .conftest import compiled
from .numerics import RESULT, assert_as_exact_as_eager, distance, leaves, poison_memory

CPU = torch.device("cpu")
ACTIVATIONS = (None, "gelu", "relu")


def case(shape: tuple[int, ...], device: torch.device, mean: float = 0.0) -> list[Tensor]:
    """The map, channels-last, weight and bias."""
    x = (torch.randn(shape, device=device) + mean).to(memory_format=torch.channels_last)
    weight, bias = (1 + 0.3 * torch.randn(shape[1], device=device) for _ in range(2))
    return [x, weight, bias]


def running(x: Tensor) -> list[Tensor]:
    """Running mean and variance as a new module has them."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return [make(x.shape[1], dtype=wide, device=x.device) for make in (torch.zeros, torch.ones)]


def normed(activation: str | None = None):
    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        statistics = running(x)
        weight, bias = (t.to(statistics[0].dtype) for t in (weight, bias))
        return batch_norm(x, weight, bias, *statistics, activation=activation)

    return function


def slope(x: Tensor) -> Tensor:
    return torch.randn_like(x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_pytorchs(activation: str | None) -> None:
    torch.manual_seed(0)
    module = nn.BatchNorm2d(6, momentum=0.3, eps=1e-3).double()
    x, weight, bias = (t.double() for t in case((3, 6, 4, 5), CPU, 2.0))
    offset = torch.randn(6).double()
    module.weight.data, module.bias.data = weight, bias
    expected = module(x + offset[:, None, None])
    mean, var = running(x)
    found = batch_norm(
        x, weight, bias, mean, var, offset=offset, momentum=0.3, eps=1e-3, activation=activation
    )
    if activation is not None:
        expected = getattr(F, activation)(expected)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(mean, module.running_mean)
    torch.testing.assert_close(var, module.running_var)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_reference_gradient(activation: str | None) -> None:
    torch.manual_seed(0)
    tensors = [t.double().requires_grad_() for t in case((2, 3, 4, 2), CPU)]
    assert torch.autograd.gradcheck(normed(activation), tensors, fast_mode=True)


def test_errors_name_the_argument() -> None:
    x, weight, bias = case((2, 8, 3, 3), CPU)
    statistics = running(x)
    with pytest.raises(ValueError, match=r"x has shape \(8, 3, 3\), expected \(B, C, H, W\)"):
        batch_norm(x[0], weight, bias, *statistics)
    with pytest.raises(ValueError, match=r"bias has shape \(7,\), expected \(8,\)"):
        batch_norm(x, weight, bias[:7], *statistics)
    with pytest.raises(ValueError, match=r"offset has shape \(1,\), expected \(8,\)"):
        batch_norm(x, weight, bias, *statistics, offset=bias[:1])
    with pytest.raises(ValueError, match="activation is 'silu'"):
        batch_norm(x, weight, bias, *statistics, activation="silu")
    with pytest.raises(ValueError, match="one value a channel has no variance"):
        batch_norm(x[:1, :, :1, :1], weight, bias, *statistics)
    torch.testing.assert_close(statistics, running(x))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_against_float64(activation, dtype, device, seed) -> None:
    shape = (2, 32, 9, 12) if device.type == "cpu" else (16, 32, 112, 112)
    tensors = case(shape, device)
    assert_as_exact_as_eager(normed(activation), tensors, dtype, slope(tensors[0]))


@pytest.mark.triton
def test_random_shapes_and_means(random_cases, device, seed) -> None:
    draw = random.Random(seed)
    for _ in random_cases:
        size = draw.choice((1, 7, 56)), draw.choice((2, 13, 31))
        shape = (draw.choice((1, 2, 5)), draw.choice((1, 3, 24, 96, 320, 640)), *size)
        mean, activation = draw.choice((0.0, 20.0)), draw.choice(ACTIVATIONS)
        print(shape, mean, activation)
        tensors = case(shape, device, mean)
        # Of few values all is rounding, once a mean twenty deviations off is taken from them.
        roundings = 256 if mean else 16
        gradient = slope(tensors[0])
        if shape[1] < 8:  # a vector of few sums, whose terms should not cancel
            gradient = gradient.abs() + tensors[0] - mean
        assert_as_exact_as_eager(normed(activation), tensors, torch.float32, gradient, roundings)


@pytest.mark.triton
@pytest.mark.parametrize("value", [0.0, -20.0, 20.0])
def test_a_constant_map_is_its_bias(value, device) -> None:
    x, weight, bias = case((2, 5, 4, 6), device)
    x.fill_(value)
    with force("triton"):
        y = batch_norm(x, weight, bias, *running(x))
    torch.testing.assert_close(y, bias[:, None, None].expand_as(y))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_statistics(dtype, device, seed) -> None:
    """Of a mean far from zero, and one pixel of the map far from that."""
    x, weight, bias = case((2, 40, 33, 17), device, 20.0)
    x[0, :, 0, 0] = -20.0
    x, offset = x.to(dtype), torch.randn(40, device=device)
    results = []
    for choice, cast in (("reference", torch.double), ("reference", dtype), ("triton", dtype)):
        statistics = running(x.to(cast))
        with force(choice):
            wide = [t.to(statistics[0].dtype) for t in (weight, bias)]
            batch_norm(x.to(cast), *wide, *statistics, offset=offset.to(dtype), momentum=0.4)
        results.append(statistics)
    for exact, eager, ours in zip(*results, strict=True):
        assert distance(ours, exact) <= RESULT * max(distance(eager, exact), 1e-6)


@pytest.mark.triton
def test_the_offset_is_in_the_running_mean_alone(device) -> None:
    tensors = leaves([*case((2, 7, 5, 3), device), torch.randn(7, device=device)], torch.float32)
    x, weight, bias, offset = tensors
    mean, var = running(x)
    other, _ = running(x)
    with force("triton"):
        y = batch_norm(x, weight, bias, mean, var, offset=offset)
        assert torch.equal(y, batch_norm(x, weight, bias, other, var))
        torch.testing.assert_close(mean, other + 0.1 * offset.detach())
        assert not torch.autograd.grad(y.square().sum(), offset)[0].any()


@pytest.mark.triton
def test_every_element_is_written(device, monkeypatch) -> None:
    poison_memory(monkeypatch)
    tensors = leaves(case((3, 40, 7, 5), device), torch.float32)
    with force("triton"):
        y = normed("gelu")(*tensors)
        gradients = torch.autograd.grad(y.sum(), tensors)
    assert all(x.isfinite().all() for x in (y, *gradients))


@pytest.mark.triton
def test_a_channels_first_map(device, seed) -> None:
    """And a gradient that is: the same as of channels-last ones."""
    x, weight, bias = case((2, 6, 5, 4), device)
    results = []
    for format in (torch.channels_last, torch.contiguous_format):
        tensors = leaves([x.contiguous(memory_format=format), weight, bias], torch.float32)
        with force("triton"):
            y = normed("gelu")(*tensors)
            gradient = x.cos().contiguous(memory_format=format)
            results.append([y, *torch.autograd.grad(y, tensors, gradient)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.triton
def test_compiles_without_a_graph_break(device) -> None:
    whole = compiled(normed("gelu"))
    for size in (2, 3, 5):
        tensors = leaves(case((2, 8, size, size + 1), device), torch.float32)
        with force("triton"):
            results = [function(*tensors) for function in (normed("gelu"), whole)]
        torch.testing.assert_close(*results)
        gradients = [torch.autograd.grad(y.square().sum(), tensors) for y in results]
        torch.testing.assert_close(*gradients)
