"""Polarity-aware attention: the reference against the formula, the Triton kernels against both."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linsight.kernels import force
from linsight.kernels.polarity_attention import polarity_attention

from .conftest import compile_whole
from .numerics import assert_as_exact_as_eager, leaves, outcome, poison_memory

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def case(
    tokens: int, heads: int, width: int, device: torch.device, magnitude: float = 1.0
) -> list[Tensor]:
    """q, k and v of one packed projection, powers, scales, a local branch, and the gate of it."""
    packed = magnitude * torch.randn(2, tokens, 4, heads, width, device=device)
    query, key, value, gate = packed.unbind(2)
    power = 1 + 4 * torch.rand(heads, width, device=device)
    scale = 0.5 + torch.rand(heads, width, device=device)
    return [query, key, value, power, scale, torch.randn_like(value), gate]


def operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    power: Tensor,
    scale: Tensor,
    local: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    return polarity_attention(q, k, v, power, scale, local=local, gate=gate)


def formula(x: Tensor, power: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x+ and x- of x (N, D)."""
    return (x / scale).relu() ** power, (-x / scale).relu() ** power


def test_is_the_formula() -> None:
    """PolaFormer's eqs. 5 to 7, head by head: similarity over same and over opposite signs."""
    torch.manual_seed(0)
    q, k, v, power, scale, local, gate = (x.double() for x in case(30, 2, 6, CPU))
    y = polarity_attention(q, k, v, power, scale, local=local, gate=gate)
    for b in range(2):
        for h in range(2):
            (q1, q2), (k1, k2) = (formula(x[b, :, h], power[h], scale[h]) for x in (q, k))
            halves = []
            for similarity, values in (
                (q1 @ k1.T + q2 @ k2.T, v[b, :, h, :3]),
                (q2 @ k1.T + q1 @ k2.T, v[b, :, h, 3:]),
            ):
                weights = similarity / 30
                halves.append(weights @ values / (weights.sum(1, keepdim=True) + 1e-6))
            expected = (torch.cat(halves, 1) + local[b, :, h]) * gate[b, :, h]
            torch.testing.assert_close(y[b, :, h], expected, rtol=1e-9, atol=1e-9)


def test_reference_gradient() -> None:
    torch.manual_seed(0)
    tensors = [x.double().requires_grad_() for x in case(4, 2, 6, CPU)]
    assert torch.autograd.gradcheck(operator, tensors, fast_mode=True)


def test_errors_name_the_argument() -> None:
    q, k, v, power, scale, local, gate = case(5, 2, 4, CPU)
    with pytest.raises(ValueError, match=r"power has shape \(8,\), expected \(2, 4\)"):
        polarity_attention(q, k, v, power.flatten(), scale)
    with pytest.raises(ValueError, match=r"scale has shape \(1, 4\), expected \(2, 4\)"):
        polarity_attention(q, k, v, power, scale[:1])
    with pytest.raises(ValueError, match="query has heads of 3 channels, expected an even number"):
        polarity_attention(*(x[..., :3] for x in (q, k, v, power, scale)))
    with pytest.raises(ValueError, match="local has shape"):
        polarity_attention(q, k, v, power, scale, local=local[:1])
    with pytest.raises(ValueError, match="gate has shape"):
        polarity_attention(q, k, v, power, scale, gate=gate[..., :2])


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_against_float64(dtype, device, seed) -> None:
    tensors = case(37, 2, 32, device) if device.type == "cpu" else case(3136, 3, 32, device)
    assert_as_exact_as_eager(operator, tensors, dtype, torch.randn_like(tensors[2]))


@pytest.mark.triton
@pytest.mark.parametrize("parts", ["", "local", "gate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_local_branch_and_gate(dtype, parts, device, seed) -> None:
    """Half of 24 channels ends within a tile that is padded to 32."""
    *tensors, local, gate = case(19, 2, 24, device)
    tensors += [local if parts == "local" else None, gate if parts == "gate" else None]
    assert_as_exact_as_eager(operator, tensors, dtype, torch.randn_like(local))


@pytest.mark.triton
def test_random_shapes_and_magnitudes(random_cases, device, seed) -> None:
    draw = random.Random(seed)
    for _ in random_cases:
        tokens, heads = draw.choice((2, 7, 19, 50)), draw.choice((1, 2, 5))
        width, magnitude = draw.choice((6, 24, 40)), draw.choice((1.0, 20.0))
        parts = draw.choice((5, 6, 7))
        print(tokens, heads, width, magnitude, parts)
        tensors = case(tokens, heads, width, device, magnitude)[:parts]
        slope = torch.randn_like(tensors[2])
        # Of few channels the scale's gradient is a few numbers whose terms cancel, as the length
        # of a query hardly counts: how well they do is rounding's luck.
        assert_as_exact_as_eager(operator, tensors, torch.float32, slope, roundings=16)


@pytest.mark.triton
def test_large_features(device, seed) -> None:
    """Normalisers whose inverse squared is below float32's numbers; they themselves are not."""
    tensors = case(7, 2, 24, device, 100.0)
    slope = torch.randn_like(tensors[2])
    assert_as_exact_as_eager(operator, tensors, torch.float32, slope, roundings=16)


@pytest.mark.triton
def test_one_token(device, seed) -> None:
    # It attends to itself: but for rounding q, k, powers and scales have no gradient.
    tensors = case(1, 2, 40, device)
    slope = torch.randn_like(tensors[2])
    ours, expected = (
        outcome(operator, tensors, torch.float32, slope, choice)
        for choice in ("triton", "reference")
    )
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-3)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_a_power_of_one(dtype, device, seed) -> None:
    """Zeros have features and a gradient of zero, and so have tokens and images of zeros."""
    q, k, v, power, scale, local, gate = case(21, 2, 12, device)
    power[:, ::3] = 1.0
    for x in (q, k):
        x[:, ::2, :, ::2] = 0.0
        x[0, 3] = 0.0
    k[1, :, 1] = 0.0
    tensors = [q, k, v, power, scale, local, gate]
    results = outcome(operator, tensors, dtype, torch.randn_like(v), "triton")
    assert all(x.isfinite().all() for x in results)
    for x, gradient in zip((q, k), results[1:3], strict=True):
        assert not gradient[x == 0].any()
    # A head without keys has a normaliser of 1e-6 alone: its gradients may be large.
    k[1, :, 1] = 1.0
    assert_as_exact_as_eager(operator, tensors, dtype, torch.randn_like(v))


@pytest.mark.triton
@pytest.mark.parametrize("axis", ["images", "tokens", "heads"])
def test_no_images_tokens_or_heads(axis, device) -> None:
    """An empty result, and gradients of zero."""
    tokens, heads = 0 if axis == "tokens" else 9, 0 if axis == "heads" else 2
    tensors = case(tokens, heads, 8, device)
    if axis == "images":
        tensors = [x if x.ndim == 2 else x[:0] for x in tensors]
    tensors = leaves(tensors, torch.float32)
    with force("triton"):
        y = operator(*tensors)
        gradients = torch.autograd.grad(y.sum(), tensors)
    assert y.shape == tensors[0].shape
    assert [g.shape for g in gradients] == [x.shape for x in tensors]
    assert not any(x.any() for x in gradients)


@pytest.mark.triton
def test_wide_heads_run_the_reference(device) -> None:
    wide = case(9, 2, 66, device)
    with force("triton"):
        z = operator(*wide)
    with force("reference"):
        assert torch.equal(operator(*wide), z)


@pytest.mark.triton
def test_every_element_is_written(device, monkeypatch) -> None:
    poison_memory(monkeypatch)
    tensors = leaves(case(9, 2, 20, device), torch.float32)
    with force("triton"):
        y = operator(*tensors)
        gradients = torch.autograd.grad(y.sum(), tensors)
    assert all(x.isfinite().all() for x in (y, *gradients))


@pytest.mark.triton
def test_strides(device, seed) -> None:
    """Tokens that no single step leads along, and channels that lie apart."""
    x = torch.randn(3, 5, 2, 12, device=device)
    apart = x.transpose(1, 2).contiguous().transpose(1, 2), x.mT.contiguous().mT
    table = 1 + torch.rand(2, 2, 24, device=device)
    tables = table[:, :, ::2].unbind()
    tensors = [*apart, x, *tables, apart[1], apart[0]]
    assert_as_exact_as_eager(operator, tensors, torch.float32, torch.randn_like(x))


@pytest.mark.triton
def test_half_precision_of_the_tables(device, seed) -> None:
    """Gradients of powers and scales have the dtype of these, which a model keeps in float32."""
    tensors = leaves(case(9, 2, 8, device), torch.bfloat16)
    tensors[3:5] = (x.detach().float().requires_grad_() for x in tensors[3:5])
    with force("triton"):
        y = operator(*tensors)
        gradients = torch.autograd.grad(y.float().sum(), tensors)
    assert y.dtype == torch.bfloat16
    assert [x.dtype for x in gradients] == [x.dtype for x in tensors]


@pytest.mark.triton
def test_registration(device) -> None:
    tensors = [x.requires_grad_() for x in leaves(case(6, 2, 8, device), torch.float32)]
    torch.library.opcheck(torch.ops.linsight.polarity_attention.default, tuple(tensors))
    torch.library.opcheck(torch.ops.linsight.polarity_attention.default, (*tensors[:5], None, None))


@pytest.mark.triton
@pytest.mark.slow
def test_compiles_without_a_graph_break(device) -> None:
    weights = torch.randn(2, 2, 8, device=device, requires_grad=True)

    def function(packed: Tensor) -> Tensor:
        q, k, v, gate = packed.unbind(2)
        power, scale = 1 + weights[0].sigmoid(), F.softplus(weights[1])
        return polarity_attention(q, k, v, power, scale, local=v, gate=gate) * 2

    whole = compile_whole(function)
    for tokens in (12, 35, 64):
        packed = torch.randn(1, tokens, 4, 2, 8, device=device, requires_grad=True)
        with force("triton"):
            y, z = function(packed), whole(packed)
            torch.testing.assert_close(z, y)
            gradients = [torch.autograd.grad(x.sin().sum(), (packed, weights)) for x in (y, z)]
            torch.testing.assert_close(*gradients)
