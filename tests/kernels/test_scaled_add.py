"""The scaled residual sum: the reference against the equation, Triton against both."""

import random

import pytest
import torch
from torch import Tensor

from linsight.kernels import force
from linsight.kernels.scaled_add import scaled_add

from .conftest import compile_whole
from .numerics import assert_as_exact_as_eager, factors, leaves, poison_memory

CPU = torch.device("cpu")


def kept(x: Tensor, branch: Tensor, scale: Tensor | None = None) -> Tensor:
    return scaled_add(x, branch, scale, factors(x))


FUNCTIONS = {"scaled": scaled_add, "scaled_kept": kept, "kept": kept}


def case(
    shape: tuple[int, ...], device: torch.device, magnitude: float = 1.0, name: str = "scaled"
) -> list[Tensor]:
    """x, branch and, as the function has it, the scale."""
    x, branch = (magnitude * torch.randn(shape, device=device) for _ in range(2))
    scale = torch.randn(shape[-1], device=device)
    return [x, branch, *([scale] if "scaled" in name else [])]


def test_reference_is_the_equation() -> None:
    torch.manual_seed(0)
    x, branch, scale = (t.double() for t in case((2, 3, 5, 12), CPU))
    torch.testing.assert_close(scaled_add(x, branch, scale), x + scale * branch)
    for s in (scale, None):
        y = kept(x, branch, s)
        torch.testing.assert_close(y[0], x[0] + 1.25 * (1 if s is None else s) * branch[0])
        torch.testing.assert_close(y[1], x[1])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_reference_gradient(name) -> None:
    torch.manual_seed(0)
    tensors = [t.double().requires_grad_() for t in case((3, 3, 8), CPU, name=name)]
    assert torch.autograd.gradcheck(FUNCTIONS[name], tensors, fast_mode=True)


def test_the_stream_keeps_its_dtype_under_autocast() -> None:
    x, branch, scale = case((2, 3, 8), CPU)
    with torch.autocast("cpu", torch.bfloat16):
        assert scaled_add(x.bfloat16(), branch, scale).dtype == torch.bfloat16
        assert scaled_add(x, branch.bfloat16(), scale).dtype == torch.float32


def test_the_sum_is_rounded_once() -> None:
    x = torch.full((1, 1), 1.0, dtype=torch.bfloat16)
    branch, scale = torch.full_like(x, 1 + 2**-7), torch.tensor([1 + 2**-7])
    exact = 1 + scale.double() * branch.double()
    assert scaled_add(x, branch, scale).item() == exact.bfloat16().item()


def test_errors_name_the_argument() -> None:
    x, branch, scale = case((2, 3, 8), CPU)
    with pytest.raises(ValueError, match=r"branch has shape \(1, 3, 8\), expected \(2, 3, 8\)"):
        scaled_add(x, branch[:1], scale)
    with pytest.raises(ValueError, match=r"scale has shape \(7,\), expected \(8,\)"):
        scaled_add(x, branch, scale[:7])
    with pytest.raises(ValueError, match=r"keep has shape \(1, 1, 1\), expected \(2, 1, 1\)"):
        scaled_add(x, branch, None, torch.ones(1, 1, 1))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_against_float64(name, dtype, device, seed) -> None:
    shape = (3, 5, 40) if device.type == "cpu" else (8, 56, 56, 64)
    tensors = case(shape, device, name=name)
    assert_as_exact_as_eager(FUNCTIONS[name], tensors, dtype, torch.randn_like(tensors[0]))


@pytest.mark.triton
def test_random_shapes_and_magnitudes(random_cases, device, seed) -> None:
    draw = random.Random(seed)
    for _ in random_cases:
        shape = (draw.choice((0, 1, 2)), draw.choice((1, 7, 97)), draw.choice((1, 3, 24, 96, 640)))
        magnitude, name = draw.choice((0.0, 1.0, 20.0)), draw.choice(list(FUNCTIONS))
        print(shape, magnitude, name)
        tensors = case(shape, device, magnitude, name)
        slope = torch.randn_like(tensors[0])
        if shape[-1] < 8:  # a gradient of few sums, whose terms should not cancel
            slope = slope.abs() * tensors[1].sign()
        assert_as_exact_as_eager(FUNCTIONS[name], tensors, torch.float32, slope)


@pytest.mark.triton
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_element_is_written(name, device, monkeypatch) -> None:
    poison_memory(monkeypatch)
    tensors = leaves(case((2, 7, 40), device, name=name), torch.float32)
    with force("triton"):
        y = FUNCTIONS[name](*tensors)
        gradients = torch.autograd.grad(y.sum(), tensors)
    assert all(x.isfinite().all() for x in (y, *gradients))


@pytest.mark.triton
def test_mixed_precisions_and_strides(device, seed) -> None:
    """A half-precision branch into a float32 stream, neither of them contiguous."""
    x, branch, scale = case((6, 5, 32), device)
    x, branch = x.transpose(0, 1), branch.bfloat16().transpose(0, 1)
    results = []
    for choice in ("reference", "triton"):
        tensors = [t.detach().requires_grad_() for t in (x, branch, scale)]
        with force(choice):
            y = scaled_add(*tensors)
            results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    for eager, ours in zip(*results, strict=True):
        assert ours.dtype == eager.dtype
        torch.testing.assert_close(ours, eager, rtol=2e-2, atol=1e-3)


@pytest.mark.triton
@pytest.mark.parametrize("frozen", range(3))
def test_frozen_tensors_get_no_gradient(frozen, device, seed) -> None:
    tensors = leaves(case((2, 9, 16), device), torch.float32)
    tensors[frozen].requires_grad_(False)
    wanted = [t for t in tensors if t.requires_grad]
    found = []
    for choice in ("triton", "reference"):
        with force(choice):
            found.append(torch.autograd.grad(scaled_add(*tensors).square().sum(), wanted))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.triton
def test_compiles_without_a_graph_break(device) -> None:
    whole = compile_whole(scaled_add)
    for size in (2, 3, 5):
        tensors = leaves(case((1, size, size + 1, 16), device), torch.float32)
        with force("triton"):
            results = [function(*tensors) for function in (scaled_add, whole)]
        torch.testing.assert_close(*results)
        gradients = [torch.autograd.grad(y.square().sum(), tensors) for y in results]
        torch.testing.assert_close(*gradients)
