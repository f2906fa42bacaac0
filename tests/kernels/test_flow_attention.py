"""Flow attention: the reference against the formula, the Triton kernels against both."""

import random

import pytest
import torch
from torch import Tensor

from linsight.kernels import force
from linsight.kernels.flow_attention import flow_attention

from .conftest import compile_whole
from .numerics import assert_as_exact_as_eager, leaves, outcome, poison_memory

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def case(
    tokens: int, heads: int, width: int, device: torch.device, magnitude: float = 1.0
) -> tuple[Tensor, ...]:
    """q, k and v sliced out of one packed projection."""
    packed = magnitude * torch.randn(2, tokens, 3, heads, width, device=device)
    return packed.clamp(-20, 20).unbind(2)


def test_reference_is_the_formula() -> None:
    torch.manual_seed(0)
    q, k, v = (x.double() for x in case(30, 2, 6, CPU, 3.0))
    y = flow_attention(q, k, v)
    e, cut = 1e-6, 0
    for b in range(2):
        for h in range(2):
            f, g = q[b, :, h].sigmoid(), k[b, :, h].sigmoid()
            pairs = (f + e) @ (g + e).T  # flow i, j, but for what e adds to the sums alone
            missing = (f + e).sum(1) * e * (1 - 30), (g + e).sum(1) * e * (1 - 30)
            taken, given = pairs.sum(1) + missing[0] + e, pairs.sum(0) + missing[1] + e
            a = (f + e) @ ((g / given[:, None]).sum(0) + e) + e
            c = (g + e) @ ((f / taken[:, None]).sum(0) + e) + e
            cut += int((c > 1).sum())
            weights = 30 * c.clamp(max=1).softmax(0)
            expected = (f @ g.T * weights) @ v[b, :, h] * (a.sigmoid() / taken)[:, None]
            torch.testing.assert_close(y[b, :, h], expected, rtol=1e-9, atol=1e-12)
    assert 0 < cut < 120, "the flows of some tokens, and not of all, are cut off"


def test_reference_gradient() -> None:
    torch.manual_seed(0)
    tensors = [x.double().requires_grad_() for x in case(5, 2, 3, CPU)]
    assert torch.autograd.gradcheck(flow_attention, tensors, fast_mode=True)


def test_errors_name_the_argument() -> None:
    q, k, v = case(5, 2, 4, CPU)
    with pytest.raises(ValueError, match=r"value is torch\.float64, expected torch\.float32"):
        flow_attention(q, k, v.double())
    with pytest.raises(ValueError, match=r"key has shape \(2, 5, 8\), expected \(B, N, heads, D\)"):
        flow_attention(q, k.flatten(2), v)
    with pytest.raises(ValueError, match="query, key and value must have one shape"):
        flow_attention(q, k[:1], v)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), [(6, 8), (3, 16), (2, 64)])
def test_error_against_float64(heads, width, dtype, device, seed) -> None:
    tokens = 37 if device.type == "cpu" else 3136
    tensors = case(tokens, heads, width, device)
    assert_as_exact_as_eager(flow_attention, tensors, dtype, torch.randn_like(tensors[2]))


@pytest.mark.triton
def test_random_shapes_and_magnitudes(random_cases, device, seed) -> None:
    draw = random.Random(seed)
    for _ in random_cases:
        tokens, heads = draw.choice((2, 7, 19, 50)), draw.choice((1, 2, 5))
        width, magnitude = draw.choice((1, 3, 8, 24, 40)), draw.choice((0.0, 1.0, 20.0))
        print(tokens, heads, width, magnitude)
        tensors = case(tokens, heads, width, device, magnitude)
        slope = torch.randn_like(tensors[2])
        assert_as_exact_as_eager(flow_attention, tensors, torch.float32, slope)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sigmoids_of_any_number(dtype, device, seed) -> None:
    """They are 0 and 1 far from zero, and there is no gradient left."""
    query, key, value = case(9, 2, 8, device)
    tensors = [1e20 * query, 1e20 * key, value]
    assert_as_exact_as_eager(flow_attention, tensors, dtype, torch.randn_like(value))


@pytest.mark.triton
def test_one_token(device, seed) -> None:
    tensors = case(1, 3, 8, device)
    slope = torch.randn_like(tensors[2])
    ours, expected = (
        outcome(flow_attention, tensors, torch.float32, slope, choice)
        for choice in ("triton", "reference")
    )
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.triton
@pytest.mark.parametrize(("heads", "width"), [(5, 3), (3, 8), (2, 20)])
def test_every_element_is_written(heads, width, device, monkeypatch) -> None:
    poison_memory(monkeypatch)
    tensors = leaves(case(9, heads, width, device), torch.float32)
    with force("triton"):
        y = flow_attention(*tensors)
        gradients = torch.autograd.grad(y.sum(), tensors)
    assert all(x.isfinite().all() for x in (y, *gradients))


@pytest.mark.triton
def test_strides(device, seed) -> None:
    """Heads, and channels, that lie apart, and a token's channels behind those of two others."""
    x = torch.randn(3, 2, 5, 3, 12, device=device)
    tensors = [
        x[0].transpose(1, 2).contiguous().transpose(1, 2),
        x[1].mT.contiguous().mT,
        torch.stack((x[2], x[2]), 1)[:, 0],
    ]
    slope = torch.randn_like(tensors[2]).transpose(1, 2).contiguous().transpose(1, 2)
    assert_as_exact_as_eager(flow_attention, tensors, torch.float32, slope)


@pytest.mark.triton
def test_registration(device) -> None:
    tensors = [x.requires_grad_() for x in case(6, 2, 8, device)]
    torch.library.opcheck(torch.ops.linsight.flow_attention.default, (*tensors,))


@pytest.mark.triton
@pytest.mark.slow
def test_compiles_without_a_graph_break(device) -> None:
    def function(packed: Tensor) -> Tensor:
        return flow_attention(*packed.unbind(2)) * 2

    whole = compile_whole(function)
    for tokens in (12, 35, 64):
        packed = torch.randn(1, tokens, 3, 2, 8, device=device, requires_grad=True)
        with force("triton"):
            y, z = function(packed), whole(packed)
            torch.testing.assert_close(z, y)
            gradients = [torch.autograd.grad(x.sin().sum(), packed) for x in (y, z)]
            torch.testing.assert_close(*gradients)
