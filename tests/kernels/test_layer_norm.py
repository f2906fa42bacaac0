"""Layer norm with its residual sum: the reference against PyTorch's, Triton against both."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linsight.kernels import add_layer_norm, force, layer_norm, scaled_add

from .conftest import compiled
from .numerics import assert_as_exact_as_eager, leaves


def both(x: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """Sum and norm beside each other, so that one gradient reaches both."""
    return torch.cat(add_layer_norm(x, branch, weight, bias, scale=scale), -1)


FUNCTIONS = {
    "norm": lambda x, branch, scale, weight, bias: layer_norm(x, weight, bias),
    "both": both,
    "unscaled": lambda x, branch, scale, weight, bias: both(x, branch, None, weight, bias),
    "norm_of_sum": lambda x, branch, scale, weight, bias: both(x, branch, scale, weight, bias)[
        ..., x.shape[-1] :
    ],
    "sum": lambda x, branch, scale, weight, bias: scaled_add(x, branch, scale),
}
USED = {"norm": (0, 3, 4), "unscaled": (0, 1, 3, 4), "sum": (0, 1, 2)}


def case(shape: tuple[int, ...], device: torch.device, magnitude: float = 1.0) -> list[Tensor]:
    """x, branch, scale, weight and bias."""
    channels = shape[-1]
    tensors = [magnitude * torch.randn(shape, device=device) for _ in range(2)]
    return tensors + [1 + 0.3 * torch.randn(channels, device=device) for _ in range(3)]


def chosen(name: str, tensors: list[Tensor]):
    """The function of the tensors that it uses, and those."""
    used = USED.get(name, range(5))

    def function(*given: Tensor) -> Tensor:
        arguments: list[Tensor | None] = [None] * 5
        for i, x in zip(used, given, strict=True):
            arguments[i] = x
        return FUNCTIONS[name](*arguments)

    return function, [tensors[i] for i in used]


def test_reference_is_pytorchs() -> None:
    torch.manual_seed(0)
    x, branch, scale, weight, bias = (t.double() for t in case((2, 3, 5, 12), torch.device("cpu")))
    total, norm = add_layer_norm(x, branch, weight, bias, scale=scale.view(1, 1, 1, -1))
    torch.testing.assert_close(total, x + scale * branch)
    torch.testing.assert_close(norm, F.layer_norm(total, (12,), weight, bias, 1e-6))
    torch.testing.assert_close(scaled_add(x, branch, scale), total)
    torch.testing.assert_close(layer_norm(total, weight, bias), norm)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_reference_gradient(name: str) -> None:
    torch.manual_seed(0)
    function, tensors = chosen(name, [t.double() for t in case((2, 3, 8), torch.device("cpu"))])
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


def test_the_stream_keeps_its_dtype_under_autocast() -> None:
    x, branch, scale, weight, bias = case((2, 3, 8), torch.device("cpu"))
    x = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        total, norm = add_layer_norm(x, branch, weight, bias, scale=scale)
    assert total.dtype == norm.dtype == torch.bfloat16
    assert layer_norm(x, weight, bias).dtype == torch.bfloat16


def test_errors_name_the_argument() -> None:
    x, branch, scale, weight, bias = case((2, 3, 8), torch.device("cpu"))
    with pytest.raises(ValueError, match="branch has shape"):
        add_layer_norm(x, branch[:1], weight, bias)
    with pytest.raises(ValueError, match="scale has 4 elements, expected 8"):
        scaled_add(x, branch, scale[:4])
    with pytest.raises(ValueError, match="weight has 7 elements, expected 8"):
        layer_norm(x, weight[:7], bias)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_against_float64(name, dtype, device, seed) -> None:
    shape = (2, 5, 40) if device.type == "cpu" else (8, 56, 56, 64)
    function, tensors = chosen(name, case(shape, device))
    slope = torch.randn(function(*tensors).shape, device=device)
    assert_as_exact_as_eager(function, tensors, dtype, slope)


@pytest.mark.triton
def test_random_shapes_and_magnitudes(device, seed) -> None:
    draw = random.Random(seed)
    for _ in range(2 if device.type == "cpu" else 20):
        shape = (draw.choice((1, 2)), draw.choice((1, 7, 97)), draw.choice((1, 24, 96, 320, 640)))
        magnitude = draw.choice((0.0, 1.0, 20.0))
        name = draw.choice(list(FUNCTIONS))
        print(shape, magnitude, name)
        function, tensors = chosen(name, case(shape, device, magnitude))
        slope = torch.randn(function(*tensors).shape, device=device)
        # One channel, or none but zeros, is all rounding once its mean is taken off.
        roundings = 1e4 if shape[-1] == 1 or magnitude == 0 else None
        assert_as_exact_as_eager(function, tensors, torch.float32, slope, roundings)


@pytest.mark.triton
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_element_is_written(name, device, monkeypatch) -> None:
    empty = torch.empty
    nan = float("nan")
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: empty(*size, **kw).fill_(nan))
    function, tensors = chosen(name, case((2, 7, 40), device))
    tensors = leaves(tensors, torch.float32)
    with force("triton"):
        y = function(*tensors)
        gradients = torch.autograd.grad(y.sum(), tensors)
    assert all(x.isfinite().all() for x in (y, *gradients))


@pytest.mark.triton
def test_mixed_precisions_and_strides(device, seed) -> None:
    """A half-precision branch into a float32 stream, neither of them contiguous."""
    x, branch, scale, weight, bias = case((6, 5, 32), device)
    x, branch = x.transpose(0, 1), branch.bfloat16().transpose(0, 1)
    results = []
    for choice in ("reference", "triton"):
        tensors = [t.detach().requires_grad_() for t in (x, branch, scale, weight, bias)]
        with force(choice):
            y = both(*tensors)
            results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    for eager, ours in zip(*results, strict=True):
        assert ours.dtype == eager.dtype
        torch.testing.assert_close(ours, eager, rtol=2e-2, atol=1e-3)


@pytest.mark.triton
def test_registration(device) -> None:
    x, branch, scale, weight, bias = (t.requires_grad_() for t in case((2, 3, 8), device))
    operator = torch.ops.linsight.layer_norm.default
    torch.library.opcheck(operator, (x, branch, scale, weight, bias, 1e-6))
    torch.library.opcheck(operator, (x, None, None, weight, bias, 1e-6))
    torch.library.opcheck(operator, (x, branch, scale, None, None, 0.0))


@pytest.mark.triton
def test_compiles_without_a_graph_break(device) -> None:
    _, _, scale, weight, bias = (t.requires_grad_() for t in case((1, 16), device))

    def function(x: Tensor) -> Tensor:
        total, norm = add_layer_norm(x, layer_norm(x, weight, bias), weight, bias, scale=scale)
        return scaled_add(total, norm, scale)

    whole = compiled(function)
    for size in (2, 3, 5):
        x = torch.randn(1, size, size + 1, 16, device=device)
        with force("triton"):
            y, z = function(x), whole(x)
            torch.testing.assert_close(z, y)
            gradients = [torch.autograd.grad(result.sum(), weight)[0] for result in (y, z)]
            torch.testing.assert_close(*gradients)
