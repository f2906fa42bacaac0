"""Focused linear attention: the reference against the formula, the Triton kernels against both."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linsight.kernels import force
from linsight.kernels.depthwise_conv2d import depthwise_conv2d
from linsight.kernels.focused_linear_attention import focused_linear_attention
from linsight.kernels.focused_linear_attention.reference import focused_power

from .conftest import compile_whole
from .numerics import assert_as_exact_as_eager, leaves, outcome, poison_memory

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def formula(x: Tensor, scale: Tensor, power: int = 3) -> Tensor:
    """FLatten's features of x (..., C)."""
    t = (x.relu() + 1e-6) / (1 + scale.exp()).log()
    focused = t**power
    return t.norm(dim=-1, keepdim=True) * focused / focused.norm(dim=-1, keepdim=True)


def case(
    tokens: int, heads: int, width: int, device: torch.device, magnitude: float = 1.0
) -> list[Tensor]:
    """q, k and v sliced out of one packed projection, the scale, and a local branch."""
    packed = (magnitude * torch.randn(2, tokens, 3, heads, width, device=device)).clamp(-20, 20)
    local = torch.randn(2, tokens, heads, width, device=device)
    return [*packed.unbind(2), torch.randn(heads * width, device=device), local]


def operator(power: int = 3):
    def function(q, k, v, scale, local=None):
        return focused_linear_attention(q, k, v, scale, power=power, local=local)

    return function


@pytest.mark.parametrize("power", [1, 3, 4])
def test_features_are_the_formula(power: int) -> None:
    torch.manual_seed(0)
    q, _, _, scale, _ = (x.double() for x in case(7, 2, 6, CPU))
    features = focused_power(q, scale, power).flatten(2)
    torch.testing.assert_close(features, formula(q.flatten(2), scale, power), rtol=1e-12, atol=0)


def test_flatten_attention_is_the_formula() -> None:
    """FLatten's module but for its projections: one convolution, shared by all heads, of v."""
    torch.manual_seed(0)
    q, k, v, scale, _ = (x.double() for x in case(30, 2, 16, CPU))
    weight, bias = torch.randn(16, 1, 5, 5).double(), torch.randn(16).double()
    shared = weight.repeat(2, 1, 1, 1), bias.repeat(2)
    local = depthwise_conv2d(v.flatten(2).unflatten(1, (6, 5)), *shared)
    y = focused_linear_attention(q, k, v, scale, local=local.reshape(v.shape))
    f, g = (formula(x.flatten(2), scale).unflatten(-1, (2, 16)) for x in (q, k))
    for b in range(2):
        for h in range(2):
            similarity = f[b, :, h] @ g[b, :, h].T / 30
            expected = similarity @ v[b, :, h] / (similarity.sum(1, keepdim=True) + 1e-6)
            image = v[b, :, h].T.unflatten(1, (6, 5))[None]
            expected += F.conv2d(image, weight, bias, padding=2, groups=16)[0].flatten(1).T
            torch.testing.assert_close(y[b, :, h], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("power", [1, 3])
def test_reference_gradient(power: int) -> None:
    torch.manual_seed(0)
    tensors = [x.double().requires_grad_() for x in case(4, 2, 3, CPU)]
    assert torch.autograd.gradcheck(operator(power), tensors, fast_mode=True)


def test_errors_name_the_argument() -> None:
    q, k, v, scale, local = case(5, 2, 4, CPU)
    with pytest.raises(ValueError, match=r"scale has shape \(1, 8\), expected \(8,\)"):
        focused_linear_attention(q, k, v, scale[None])
    with pytest.raises(ValueError, match=r"key is torch\.float64, expected torch\.float32"):
        focused_linear_attention(q, k.double(), v, scale)
    with pytest.raises(ValueError, match="power is 0, expected an integer"):
        focused_linear_attention(q, k, v, scale, power=0)
    with pytest.raises(ValueError, match="local has shape"):
        focused_linear_attention(q, k, v, scale, local=local[:1])


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_against_float64(dtype, device, seed) -> None:
    tensors = case(17, 2, 16, device) if device.type == "cpu" else case(3136, 3, 32, device)
    assert_as_exact_as_eager(operator(), tensors, dtype, torch.randn_like(tensors[2]))


@pytest.mark.triton
def test_random_shapes_and_magnitudes(random_cases, device, seed) -> None:
    draw = random.Random(seed)
    for _ in random_cases:
        tokens, power = draw.choice((2, 7, 19)), draw.choice((1, 2, 3, 5))
        heads, width = draw.choice((1, 2, 5)), draw.choice((3, 24, 40))
        magnitude, local = draw.choice((0.0, 1.0, 20.0)), draw.choice((0, 1))
        print(tokens, heads, width, power, magnitude, local)
        tensors = case(tokens, heads, width, device, magnitude)[: 4 + local]
        slope = torch.randn_like(tensors[2])
        # Of few channels the scale's gradient is a few numbers whose terms cancel, as the length
        # of a query hardly counts: how well they do is rounding's luck.
        assert_as_exact_as_eager(operator(power), tensors, torch.float32, slope, roundings=16)


@pytest.mark.triton
@pytest.mark.parametrize("power", [2, 3])
def test_one_token(power, device, seed) -> None:
    # It attends to itself: but for rounding q, k and the scale have no gradient.
    tensors = case(1, 2, 40, device)
    slope = torch.randn_like(tensors[2])
    ours, expected = (
        outcome(operator(power), tensors, torch.float32, slope, choice)
        for choice in ("triton", "reference")
    )
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-3)


@pytest.mark.triton
def test_the_range_of_float32_is_enough(device) -> None:
    """Where cubes, or their squares, leave it, and where a scale's softplus would."""
    from linsight.kernels.focused_linear_attention.forward import forward

    for magnitude, s in ((1e13, -10.0), (1e13, 30.0), (0.0, -20.0), (0.0, 30.0)):
        x = torch.full((1, 2, 2, 4), magnitude, device=device)
        scale = torch.full((8,), s, device=device)
        wide, exact = x.double().flatten(2), scale.double().exp().log1p()
        wide = (wide + 1e-6) / exact  # of equal channels the map is the identity
        f, g = torch.empty_like(x), torch.empty_like(x)
        forward(x, x, scale, 3, f, g)
        for y in (f, g, focused_power(x, scale, 3)):
            torch.testing.assert_close(y.flatten(2).double(), wide, rtol=2e-6, atol=0)


@pytest.mark.triton
def test_every_element_is_written(device, monkeypatch) -> None:
    poison_memory(monkeypatch)
    tensors = leaves(case(9, 2, 20, device), torch.float32)
    with force("triton"):
        y = operator()(*tensors)
        gradients = torch.autograd.grad(y.sum(), tensors)
    assert all(x.isfinite().all() for x in (y, *gradients))


@pytest.mark.triton
def test_strides(device, seed) -> None:
    """Tokens that no single step leads along, and channels that lie apart."""
    x = torch.randn(3, 5, 2, 12, device=device)
    apart = x.transpose(1, 2).contiguous().transpose(1, 2), x.mT.contiguous().mT
    tensors = [*apart, x, torch.randn(24, device=device)]
    assert_as_exact_as_eager(operator(), tensors, torch.float32, torch.randn_like(x))


@pytest.mark.triton
def test_registration(device) -> None:
    tensors = [x.requires_grad_() for x in case(6, 2, 8, device)]
    torch.library.opcheck(torch.ops.linsight.focused_linear_attention.default, (*tensors, 3))


@pytest.mark.triton
@pytest.mark.slow
def test_compiles_without_a_graph_break(device) -> None:
    scale = torch.randn(16, device=device, requires_grad=True)

    def function(packed: Tensor) -> Tensor:
        q, k, v = packed.unbind(2)
        return focused_linear_attention(q, k, v, scale, local=v) * 2

    whole = compile_whole(function)
    for tokens in (12, 35, 64):
        packed = torch.randn(1, tokens, 3, 2, 8, device=device, requires_grad=True)
        with force("triton"):
            y, z = function(packed), whole(packed)
            torch.testing.assert_close(z, y)
            gradients = [torch.autograd.grad(x.sin().sum(), (packed, scale)) for x in (y, z)]
            torch.testing.assert_close(*gradients)
