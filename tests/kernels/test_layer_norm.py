"""Layer norm with its residual sum: the reference against PyTorch's, Triton against both."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linsight.kernels import force
from linsight.kernels.layer_norm import add_layer_norm, layer_norm, rms_norm

from .conftest import compile_whole
from .numerics import assert_as_exact_as_eager, factors, leaves


def sum_and_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch: Tensor,
    scale: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return add_layer_norm(x, branch, weight, bias, scale=scale, keep=keep)


def both(*tensors: Tensor, keep: Tensor | None = None) -> Tensor:
    """Sum and norm beside each other, so that one gradient reaches both."""
    return torch.cat(sum_and_norm(*tensors, keep=keep), -1)


def kept(*tensors: Tensor) -> Tensor:
    return both(*tensors, keep=factors(tensors[0]))


def only_norm(*tensors: Tensor) -> Tensor:
    return sum_and_norm(*tensors)[1]


def only_sum(*tensors: Tensor, keep: Tensor | None = None) -> Tensor:
    # The vectors of the norm take part with a gradient of zero.
    return sum_and_norm(*tensors, keep=keep)[0] + 0 * (tensors[1] + tensors[2])


def packed_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """The norm of a slice of a packed projection."""
    return rms_norm(torch.cat((x, x), -1).chunk(2, -1)[1], weight, eps=1e-6)


FUNCTIONS = {
    "norm": layer_norm,
    "rms_norm": packed_rms_norm,
    "sum_and_norm": both,
    "norm_of_sum": lambda *tensors: both(*tensors)[..., tensors[0].shape[-1] :],
    "scaled_sum_and_norm": both,
    "norm_of_scaled_sum": only_norm,
    "scaled_sum": only_sum,
    "kept_sum_and_norm": kept,
    "kept_scaled_sum_and_norm": kept,
    "kept_sum": lambda *tensors: only_sum(*tensors, keep=factors(tensors[0])),
}


def case(
    name: str, shape: tuple[int, ...], device: torch.device, magnitude: float = 1.0
) -> list[Tensor]:
    """x, weight, bias and, as the function has them, the branch and its scale."""
    x, branch = (magnitude * torch.randn(shape, device=device) for _ in range(2))
    weight, bias, scale = (1 + 0.3 * torch.randn(shape[-1], device=device) for _ in range(3))
    if name == "rms_norm":
        return [x, weight]
    if name == "norm":
        return [x, weight, bias]
    return [x, weight, bias, branch, *([scale] if "scaled" in name else [])]


CPU = torch.device("cpu")


def test_reference_is_pytorchs() -> None:
    torch.manual_seed(0)
    x, weight, bias, branch = (t.double() for t in case("both", (2, 3, 5, 12), CPU))
    total, norm = add_layer_norm(x, branch, weight, bias)
    torch.testing.assert_close(total, x + branch)
    torch.testing.assert_close(norm, F.layer_norm(total, (12,), weight, bias, 1e-6))
    torch.testing.assert_close(layer_norm(total, weight, bias), norm)
    scaled, norm = add_layer_norm(x, branch, weight, bias, scale=weight)
    torch.testing.assert_close(scaled, x + weight * branch)
    torch.testing.assert_close(norm, F.layer_norm(scaled, (12,), weight, bias, 1e-6))
    kept_sum, _ = add_layer_norm(x, branch, weight, bias, scale=weight, keep=factors(x))
    torch.testing.assert_close(kept_sum[0], x[0] + 1.25 * weight * branch[0])
    torch.testing.assert_close(kept_sum[1], x[1])
    square = x.square().mean(-1, keepdim=True)
    torch.testing.assert_close(rms_norm(x, weight, eps=1e-6), x / (square + 1e-6).sqrt() * weight)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_reference_gradient(name: str) -> None:
    torch.manual_seed(0)
    tensors = [t.double().requires_grad_() for t in case(name, (2, 3, 8), CPU)]
    assert torch.autograd.gradcheck(FUNCTIONS[name], tensors, fast_mode=True)


def test_the_stream_keeps_its_dtype_under_autocast() -> None:
    x, weight, bias, branch = case("both", (2, 3, 8), CPU)
    x = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        total, norm = add_layer_norm(x, branch, weight, bias)
        root = rms_norm(x, weight, eps=1e-6)
    assert total.dtype == norm.dtype == root.dtype == torch.bfloat16
    assert layer_norm(x, weight, bias).dtype == torch.bfloat16


def test_errors_name_the_argument() -> None:
    x, weight, bias, branch = case("both", (2, 3, 8), CPU)
    with pytest.raises(ValueError, match="branch has shape"):
        add_layer_norm(x, branch[:1], weight, bias)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\), expected \(8,\)"):
        layer_norm(x, weight[:7], bias)
    with pytest.raises(ValueError, match=r"scale has shape \(1,\), expected \(8,\)"):
        add_layer_norm(x, branch, weight, bias, scale=bias[:1])
    with pytest.raises(ValueError, match=r"keep has shape \(2,\), expected \(2, 1, 1\)"):
        add_layer_norm(x, branch, weight, bias, keep=torch.ones(2))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_against_float64(name, dtype, device, seed) -> None:
    shape = (2, 5, 40) if device.type == "cpu" else (8, 56, 56, 64)
    tensors = case(name, shape, device)
    slope = torch.randn(FUNCTIONS[name](*tensors).shape, device=device)
    assert_as_exact_as_eager(FUNCTIONS[name], tensors, dtype, slope)


@pytest.mark.triton
def test_random_shapes_and_magnitudes(random_cases, device, seed) -> None:
    draw = random.Random(seed)
    for _ in random_cases:
        shape = (draw.choice((1, 2)), draw.choice((1, 7, 97)), draw.choice((3, 24, 96, 320, 640)))
        magnitude = draw.choice((0.0, 1.0, 20.0))
        name = draw.choice(list(FUNCTIONS))
        print(shape, magnitude, name)
        tensors = case(name, shape, device, magnitude)
        slope = torch.randn(FUNCTIONS[name](*tensors).shape, device=device)
        # Of nothing but zeros all is rounding once the mean is taken off, of few channels much.
        roundings = (16 if shape[-1] < 8 else None) if magnitude else 1e4
        assert_as_exact_as_eager(FUNCTIONS[name], tensors, torch.float32, slope, roundings)


@pytest.mark.triton
def test_of_one_channel_the_bias_is_left(device) -> None:
    x, weight, bias = case("norm", (2, 5, 1), device, 20.0)
    with force("triton"):
        torch.testing.assert_close(layer_norm(x, weight, bias), bias.expand(2, 5, 1))


@pytest.mark.triton
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_element_is_written(name, device, monkeypatch) -> None:
    empty = torch.empty
    nan = float("nan")
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: empty(*size, **kw).fill_(nan))
    tensors = leaves(case(name, (2, 7, 40), device), torch.float32)
    with force("triton"):
        y = FUNCTIONS[name](*tensors)
        gradients = torch.autograd.grad(y.sum(), tensors)
    assert all(x.isfinite().all() for x in (y, *gradients))


@pytest.mark.triton
@pytest.mark.parametrize("name", FUNCTIONS)
def test_vectors_with_strides(name, device, seed) -> None:
    """Weights, biases and scales that are columns of a matrix, and one number for all channels."""
    x, *rest = case(name, (2, 5, 12), device)
    slope = torch.randn_like(FUNCTIONS[name](x, *rest))
    columns = [v if v.ndim > 1 else v.repeat_interleave(3)[::3] for v in rest]
    same = [v if v.ndim > 1 else v[:1].expand(12) for v in rest]
    for tensors in ([x, *columns], [x, *same]):
        results = []
        for choice in ("triton", "reference"):
            with force(choice):
                given = [t.detach().requires_grad_() for t in tensors]
                y = FUNCTIONS[name](*given)
                results.append([y, *torch.autograd.grad(y, given, slope)])
        torch.testing.assert_close(*results)


@pytest.mark.triton
def test_mixed_precisions_and_strides(device, seed) -> None:
    """A half-precision branch into a float32 stream, neither of them contiguous."""
    x, weight, bias, branch, scale = case("scaled", (6, 5, 32), device)
    x, branch = x.transpose(0, 1), branch.bfloat16().transpose(0, 1)
    for given in ([x, weight, bias, branch], [x, weight, bias, branch, scale]):
        results = []
        for choice in ("reference", "triton"):
            tensors = [t.detach().requires_grad_() for t in given]
            with force(choice):
                y = both(*tensors)
                results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
        for eager, ours in zip(*results, strict=True):
            assert ours.dtype == eager.dtype
            torch.testing.assert_close(ours, eager, rtol=2e-2, atol=1e-3)


@pytest.mark.triton
def test_compiles_without_a_graph_break(device) -> None:
    _, weight, bias, _ = (t.requires_grad_() for t in case("both", (1, 16), device))

    def function(x: Tensor) -> Tensor:
        total, norm = add_layer_norm(x, layer_norm(x, weight, bias), weight, bias)
        return total + norm

    whole = compile_whole(function)
    for size in (2, 3, 5):
        x = torch.randn(1, size, size + 1, 16, device=device)
        with force("triton"):
            y, z = function(x), whole(x)
            torch.testing.assert_close(z, y)
            gradients = [torch.autograd.grad(result.sum(), weight)[0] for result in (y, z)]
            torch.testing.assert_close(*gradients)
