"""Attention between codes: the reference against the formula, the Triton kernels against both."""

import random

import pytest
import torch
from torch import Tensor

from linsight.kernels import force
from linsight.kernels import hash_attention as package
from linsight.kernels.hash_attention import hash_attention
from linsight.kernels.hash_attention.reference import hash_queries

from .conftest import compile_whole
from .numerics import assert_as_exact_as_eager, leaves, outcome, poison_memory

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def case(
    tokens: int,
    heads: int,
    width: int,
    device: torch.device,
    bits: int = 16,
    number: int = 25,
    magnitude: float = 1.0,
) -> tuple[list[Tensor], list[Tensor]]:
    """Query and value sliced out of one packed projection; and anchors, means and hyperplanes."""
    packed = magnitude * torch.randn(2, tokens, 2, heads, width, device=device)
    anchors = torch.randn(heads, number, width, device=device)
    anchors /= anchors.norm(dim=-1, keepdim=True)
    means = 0.6 + 0.02 * torch.randn(heads, number, device=device)
    hyperplanes = torch.randn(heads, bits, number, device=device)
    return list(packed.unbind(2)), [anchors, means, hyperplanes]


def bind(constants: list[Tensor]):
    """The operator as a function of query and value."""

    def function(query: Tensor, value: Tensor) -> Tensor:
        return hash_attention(query, value, *constants)

    return function


def test_codes_are_the_formula() -> None:
    torch.manual_seed(0)
    (query, value), constants = case(6, 2, 5, CPU, bits=4, number=3)
    query, value, anchors, means, planes = (x.double() for x in (query, value, *constants))
    query[0, 2] = 0
    y = hash_attention(query, value, anchors, means, planes)
    for b in range(2):
        for h in range(2):
            u = torch.nn.functional.normalize(query[b, :, h])
            # A query of zeros counts as if it had length one, as in the authors' code.
            d = 1 - 2 * u @ anchors[h].T + anchors[h].square().sum(-1)
            sides = (torch.exp(-d / (2 * d.mean())) - means[h]) @ planes[h].T
            code = sides.sign()
            weights = code @ code.T
            v = value[b, :, h]
            expected = (weights @ v + 5 * v) / (weights.sum(1) + 6 * 5)[:, None]
            torch.testing.assert_close(y[b, :, h], expected)


def test_a_sign_has_the_gradient_of_the_identity() -> None:
    torch.manual_seed(0)
    (query, _), constants = case(5, 2, 4, CPU, bits=6, number=3)
    query = query.transpose(1, 2).double().requires_grad_()
    anchors, means, planes = (x.double() for x in constants)
    slope = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    code = hash_queries(query, anchors, means, planes)
    (found,) = torch.autograd.grad(code, query, slope)

    def sides(query: Tensor) -> Tensor:
        u = query / query.norm(dim=-1, keepdim=True)
        d = 1 - 2 * u @ anchors.mT + anchors.square().sum(-1)[:, None]
        return (torch.exp(d / (-2 * d.mean((-2, -1), keepdim=True))) - means[:, None]) @ planes.mT

    inside = sides(query).abs() < 1
    assert inside.any()
    assert not inside.all()
    (expected,) = torch.autograd.grad(sides(query), query, slope * inside)
    torch.testing.assert_close(found, expected)


def test_errors_name_the_argument() -> None:
    (query, value), (anchors, means, planes) = case(5, 2, 4, CPU)
    with pytest.raises(ValueError, match=r"query has shape \(5, 2, 4\)"):
        hash_attention(query[0], value[0], anchors, means, planes)
    with pytest.raises(ValueError, match=r"value is torch\.float64 of shape .* as query is"):
        hash_attention(query, value.double(), anchors, means, planes)
    with pytest.raises(ValueError, match=r"anchors has shape \(1, 25, 4\), expected \(2, 25, 4\)"):
        hash_attention(query, value, anchors[:1], means, planes)
    with pytest.raises(ValueError, match=r"means has shape \(2, 24\), expected \(2, 25\)"):
        hash_attention(query, value, anchors, means[:, 1:], planes)
    with pytest.raises(ValueError, match="hyperplanes has shape"):
        hash_attention(query, value, anchors, means, planes[..., 1:])


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_against_float64(dtype, device, seed) -> None:
    size = (37, 2, 16) if device.type == "cpu" else (3136, 2, 32)
    tensors, constants = case(*size, device)
    assert_as_exact_as_eager(bind(constants), tensors, dtype, torch.randn_like(tensors[1]))


@pytest.mark.triton
def test_random_shapes(random_cases, device, seed) -> None:
    draw = random.Random(seed)
    for _ in random_cases:
        size = draw.choice((1, 2, 7, 70)), draw.choice((1, 3)), draw.choice((3, 24, 40))
        bits, number = draw.choice((1, 5, 16, 20)), draw.choice((1, 7, 25))
        magnitude = draw.choice((1e-3, 1.0, 20.0))
        print(size, bits, number, magnitude)
        tensors, constants = case(*size, device, bits, number, magnitude)
        slope = torch.randn_like(tensors[1])
        assert_as_exact_as_eager(bind(constants), tensors, torch.float32, slope, roundings=16)


@pytest.mark.triton
def test_no_direction(device, seed) -> None:
    """Queries of zeros, anchors of zeros as a new model has them, and sides of zero."""
    (query, value), (anchors, means, planes) = case(9, 2, 20, device)
    query[:, ::2] = 0
    for constants in (
        [anchors, means, planes],
        [0 * anchors, means, planes],
        [anchors, means, 0 * planes],
    ):
        slope = torch.randn_like(value)
        ours, expected = (
            outcome(bind(constants), [query, value], torch.float32, slope, choice)
            for choice in ("triton", "reference")
        )
        for x, y in zip(ours, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.triton
def test_what_is_no_number_stays_in_its_head(device) -> None:
    (query, value), constants = case(9, 2, 20, device)
    query[1, 3, 0, 5] = float("nan")
    with force("triton"):
        y = bind(constants)(query, value)
    assert y[1, :, 0].isnan().all()
    assert y[0].isfinite().all()
    assert y[1, :, 1].isfinite().all()


@pytest.mark.triton
def test_no_tokens(device) -> None:
    tensors, constants = case(0, 2, 20, device)
    tensors = leaves(tensors, torch.float32)
    with force("triton"):
        y = bind(constants)(*tensors)
        gradients = torch.autograd.grad(y.sum(), tensors)
    assert all(x.shape == (2, 0, 2, 20) for x in (y, *gradients))


@pytest.mark.triton
@pytest.mark.parametrize(("number", "bits"), [(33, 16), (25, 33)])
def test_many_anchors_and_long_codes_run_the_reference(number, bits, device, monkeypatch) -> None:
    monkeypatch.setattr(package.operator, "hash_attention", None)
    tensors, constants = case(4, 1, 8, device, bits=bits, number=number)
    with force("triton"):
        assert bind(constants)(*tensors).shape == (2, 4, 1, 8)


@pytest.mark.triton
def test_every_element_is_written(device, monkeypatch) -> None:
    poison_memory(monkeypatch)
    tensors, constants = case(9, 2, 20, device)
    tensors = leaves(tensors, torch.float32)
    with force("triton"):
        y = bind(constants)(*tensors)
        gradients = torch.autograd.grad(y.sum(), tensors)
    assert all(x.isfinite().all() for x in (y, *gradients))


@pytest.mark.triton
def test_strides(device, seed) -> None:
    """Tokens that no single step leads along, and channels that lie apart."""
    x = torch.randn(2, 5, 2, 12, device=device)
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2), x.mT.contiguous().mT]
    _, constants = case(5, 2, 12, device)
    assert_as_exact_as_eager(bind(constants), tensors, torch.float32, torch.randn_like(x))


@pytest.mark.triton
def test_registration(device) -> None:
    tensors, constants = case(6, 2, 8, device)
    arguments = (*(x.requires_grad_() for x in tensors), *constants)
    torch.library.opcheck(torch.ops.linsight.hash_attention.default, arguments)


@pytest.mark.triton
@pytest.mark.slow
def test_compiles_without_a_graph_break(device) -> None:
    _, constants = case(6, 2, 8, device)

    def function(packed: Tensor) -> Tensor:
        return bind(constants)(*packed.unbind(2)) * 2

    whole = compile_whole(function)
    for tokens in (12, 35, 64):
        packed = torch.randn(1, tokens, 2, 2, 8, device=device, requires_grad=True)
        with force("triton"):
            y, z = function(packed), whole(packed)
            torch.testing.assert_close(z, y)
            gradients = [torch.autograd.grad(x.sin().sum(), packed)[0] for x in (y, z)]
            torch.testing.assert_close(*gradients)
