"""Attention with mixed states: the reference against the formula, the kernels against both."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from linsight.kernels import force
from linsight.kernels import mixed_state_attention as package
from linsight.kernels.mixed_state_attention import MOST_TRITON_TOKENS, mixed_state_attention

from .conftest import compile_whole
from .numerics import assert_as_exact_as_eager, leaves, outcome, poison_memory

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Maps that 2 x 2 squares divide, and do not; one with fewer rows than squares, and one token.
SIZES = ((6, 8), (5, 7), (1, 9), (1, 1))


def case(
    size: tuple[int, int],
    squares: int,
    heads: int,
    width: int,
    device: torch.device,
    magnitude: float = 1.0,
    prefix: int = 0,
) -> list[Tensor]:
    """q, k and v sliced out of one packed projection, the mixing, and a local branch."""
    tokens = prefix + size[0] * size[1]
    packed = magnitude * torch.randn(2, tokens, 3, heads, width, device=device)
    mixing = torch.rand(squares**2, squares**2, device=device)
    return [*packed.unbind(2), mixing, torch.randn(2, tokens, heads, width, device=device)]


@pytest.fixture(params=["pairs", "states"])
def way(request, monkeypatch) -> None:
    """The kernels that take pairs of tokens, and those that make states, on maps of any size."""
    most = 0 if request.param == "states" else 1 << 30
    monkeypatch.setattr(package, "PAIRS_PER_STATE_ROW", most)


def operator(size: tuple[int, int], prefix: int = 0):
    def function(q, k, v, mixing, local=None):
        return mixed_state_attention(q, k, v, mixing, size, local=local, prefix_tokens=prefix)

    return function


def places(size: tuple[int, int], squares: int) -> tuple[Tensor, Tensor]:
    """The square of each token, and its place in it."""
    rows, columns = (-(-side // squares) for side in size)
    row, column = (x.flatten() for x in torch.meshgrid(*map(torch.arange, size), indexing="ij"))
    square = row // rows * squares + column // columns
    return square, row % rows * columns + column % columns


def formula(q: Tensor, k: Tensor, v: Tensor, mixing: Tensor, size: tuple[int, int]) -> Tensor:
    """One head, token by token: q, k, v are (N, D)."""
    f, g = q.relu() + 1e-6, k.relu() + 1e-6
    square, place = places(size, round(len(mixing) ** 0.5))
    result = []
    for token in range(len(q)):
        state = sum(
            mixing[square[token], square[other]] * torch.outer(g[other], v[other])
            for other in range(len(q))
        )
        z = sum(
            mixing[square[token], square[peer]] * (f[peer] @ g[square == square[peer]].sum(0))
            for peer in range(len(q))
            if place[peer] == place[token]
        )
        result.append(f[token] @ state / (z + 1e-6))
    return torch.stack(result)


@pytest.mark.parametrize("size", SIZES)
def test_reference_is_the_formula(size) -> None:
    torch.manual_seed(0)
    q, k, v, mixing, local = (x.double() for x in case(size, 2, 2, 4, CPU))
    y = mixed_state_attention(q, k, v, mixing, size, local=local)
    for b in range(2):
        for h in range(2):
            expected = formula(q[b, :, h], k[b, :, h], v[b, :, h], mixing, size)
            torch.testing.assert_close(y[b, :, h], expected + local[b, :, h])


def test_one_square_is_linear_attention() -> None:
    torch.manual_seed(0)
    q, k, v, _, _ = (x.double() for x in case((3, 5), 1, 2, 4, CPU))
    y = mixed_state_attention(q, k, v, torch.ones(1, 1), (3, 5))
    weights = torch.einsum("bnhd,bmhd->bhnm", q.relu() + 1e-6, k.relu() + 1e-6)
    expected = torch.einsum("bhnm,bmhd->bnhd", weights, v)
    total = weights.sum(-1).transpose(1, 2)[..., None]
    torch.testing.assert_close(y, expected / (total + 1e-6))


@pytest.mark.parametrize("prefix", [0, 2])
def test_reference_gradient(prefix) -> None:
    torch.manual_seed(0)
    tensors = [x.double().requires_grad_() for x in case((3, 4), 2, 2, 3, CPU, prefix=prefix)]
    assert torch.autograd.gradcheck(operator((3, 4), prefix), tensors, fast_mode=True)


def test_errors_name_the_argument() -> None:
    q, k, v, mixing, local = case((3, 4), 2, 2, 4, CPU)
    with pytest.raises(ValueError, match=r"mixing has shape \(3, 4\), expected \(M, M\)"):
        mixed_state_attention(q, k, v, mixing[:3], (3, 4))
    with pytest.raises(ValueError, match=r"mixing has shape \(5, 5\)"):
        mixed_state_attention(q, k, v, torch.ones(5, 5), (3, 4))
    with pytest.raises(ValueError, match=r"size is \(3, 5\) and prefix_tokens 0, but query has 12"):
        mixed_state_attention(q, k, v, mixing, (3, 5))
    with pytest.raises(ValueError, match=r"prefix_tokens 1, but query has 12 tokens"):
        mixed_state_attention(q, k, v, mixing, (3, 4), prefix_tokens=1)
    with pytest.raises(ValueError, match="local has shape"):
        mixed_state_attention(q, k, v, mixing, (3, 4), local=local[:1])


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_against_float64(way, dtype, device, seed) -> None:
    size, squares, width = ((7, 6), 2, 16) if device.type == "cpu" else ((16, 16), 4, 64)
    tensors = case(size, squares, 2, width, device)
    assert_as_exact_as_eager(operator(size), tensors, dtype, torch.randn_like(tensors[0]))


@pytest.mark.triton
@pytest.mark.parametrize(("size", "squares"), [*((size, 2) for size in SIZES), ((5, 7), 1)])
def test_maps_that_squares_do_not_divide(way, size, squares, device, seed) -> None:
    tensors = case(size, squares, 1, 8, device)
    slope = torch.randn_like(tensors[0])
    # Of one token all weights are one, and of one square A cancels: what is left of the gradients
    # is rounding.
    ours, expected = (
        outcome(operator(size), tensors, torch.float32, slope, choice)
        for choice in ("triton", "reference")
    )
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("width", "squares", "dtype"),
    [
        (96, 2, torch.float16),
        (128, 2, torch.float32),
        (24, 3, torch.float16),
        (16, 5, torch.float32),
    ],
)
def test_head_widths_and_squares(way, width, squares, dtype, device, seed) -> None:
    size = (5, 6)
    tensors = case(size, squares, 1, width, device)
    assert_as_exact_as_eager(operator(size), tensors, dtype, torch.randn_like(tensors[0]))


@pytest.mark.triton
def test_random_shapes_and_magnitudes(way, random_cases, device, seed) -> None:
    draw = random.Random(seed)
    for _ in random_cases:
        size = draw.choice((2, 5, 8)), draw.choice((3, 4, 7))
        # Of one square all of A cancels but for 1e-6, and its gradient is rounding's luck.
        squares, heads, width = draw.choice((2, 4)), draw.choice((1, 3)), draw.choice((3, 20, 40))
        magnitude, local = draw.choice((0.0, 1.0, 20.0)), draw.choice((0, 1))
        print(size, squares, heads, width, magnitude, local)
        tensors = case(size, squares, heads, width, device, magnitude)[: 4 + local]
        slope = torch.randn_like(tensors[0])
        assert_as_exact_as_eager(operator(size), tensors, draw.choice(DTYPES[:2]), slope)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_values_and_zeros(way, dtype, device, seed) -> None:
    size = (4, 6)
    tensors = case(size, 2, 1, 16, device, magnitude=7.0)
    tensors[0][:, ::3] = -1
    tensors[1][:, ::5] = -1
    assert_as_exact_as_eager(operator(size), tensors, dtype, torch.randn_like(tensors[0]))


@pytest.mark.triton
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_no_number_stays(which, way, device) -> None:
    """As the reference has it: with its query, or with all of the head if it is in a key."""
    tensors = case((4, 6), 2, 2, 16, device)
    tensors[which][1, 3, 0, 5] = float("nan")
    found = []
    for choice in ("triton", "reference"):
        with force(choice):
            found.append(operator((4, 6))(*tensors).isnan())
    assert found[0].any()
    assert torch.equal(*found)


@pytest.mark.triton
def test_every_element_is_written(way, device, monkeypatch) -> None:
    poison_memory(monkeypatch)
    tensors = leaves(case((5, 7), 3, 2, 20, device), torch.float32)
    with force("triton"):
        y = operator((5, 7))(*tensors)
        gradients = torch.autograd.grad(y.sum(), tensors)
    assert all(x.isfinite().all() for x in (y, *gradients))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("size", [(0, 3), (3, 0), (2, 3)])
def test_no_tokens_and_no_images(size, dtype, way, device) -> None:
    """An empty result, and gradients of zero."""
    tensors = case(size, 2, 2, 40, device)
    if size == (2, 3):
        tensors = [x if x.ndim == 2 else x[:0] for x in tensors]
    tensors = leaves(tensors, dtype)
    with force("triton"):
        y = operator(size)(*tensors)
        gradients = torch.autograd.grad(y.sum(), tensors)
    assert y.shape == tensors[0].shape
    assert [g.shape for g in gradients] == [x.shape for x in tensors]
    assert not any(g.any() for g in gradients)


@pytest.mark.triton
def test_strides(way, device, seed) -> None:
    """Tokens, heads and channels that lie in another order, and a mixing that is transposed."""
    q, k, v, mixing, local = case((3, 5), 2, 2, 12, device)
    q, k = q.transpose(1, 2).contiguous().transpose(1, 2), k.mT.contiguous().mT
    tensors = [q, k, v, mixing.T, local.transpose(0, 1).contiguous().transpose(0, 1)]
    assert_as_exact_as_eager(operator((3, 5)), tensors, torch.float32, torch.randn_like(v))


@pytest.mark.triton
def test_autocast_and_mixed_precisions(way, device, seed) -> None:
    """Half-precision maps with a float32 mixing and local branch, as under autocast."""
    q, k, v, mixing, local = case((4, 6), 2, 2, 16, device)
    given = [q.half(), k.half(), v.half(), mixing, local]
    results = []
    for choice in ("reference", "triton"):
        tensors = [x.detach().requires_grad_() for x in given]
        with force(choice), torch.autocast(device.type, torch.bfloat16):
            y = operator((4, 6))(*tensors)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), tensors)])
    for eager, ours in zip(*results, strict=True):
        assert ours.dtype == eager.dtype
        torch.testing.assert_close(ours, eager, rtol=5e-3, atol=5e-3)


@pytest.mark.triton
def test_what_the_kernels_leave_to_the_reference(device, monkeypatch) -> None:
    """Prefix tokens, many squares and many tokens."""
    monkeypatch.setattr(package.operator, "mixed_state_attention", None)
    cases = (((2, 3), 1, 2), ((9, 9), 9, 0), ((1, MOST_TRITON_TOKENS + 1), 1, 0))
    for size, squares, prefix in cases:
        tensors = case(size, squares, 1, 4, device, prefix=prefix)
        with force("triton"):
            y = operator(size, prefix)(*tensors)
        with force("reference"):
            torch.testing.assert_close(y, operator(size, prefix)(*tensors), rtol=0, atol=0)


@pytest.mark.triton
@pytest.mark.parametrize("by_states", [False, True])
def test_registration(by_states, device) -> None:
    q, k, v, mixing, local = (x.requires_grad_() for x in case((3, 4), 2, 2, 8, device))
    arguments = q, k, v, mixing, local if by_states else None, 3, 4, by_states
    torch.library.opcheck(torch.ops.linsight.mixed_state_attention.default, arguments)


@pytest.mark.triton
@pytest.mark.slow
def test_compiles_without_a_graph_break(device) -> None:
    mixing = torch.rand(4, 4, device=device, requires_grad=True)

    def function(packed: Tensor, size: tuple[int, int]) -> Tensor:
        q, k, v = packed.flatten(1, 2).unbind(2)
        return mixed_state_attention(q, k, v, mixing, size, local=v) * 2

    whole = compile_whole(function)
    for size in ((3, 4), (5, 7), (12, 11)):  # the last one by states
        packed = torch.randn(1, *size, 3, 2, 8, device=device, requires_grad=True)
        with force("triton"):
            y, z = function(packed, size), whole(packed, size)
            torch.testing.assert_close(z, y)
            gradients = [torch.autograd.grad(x.sin().sum(), (packed, mixing)) for x in (y, z)]
            torch.testing.assert_close(*gradients)


@given(divisor=st.integers(1, MOST_TRITON_TOKENS), n=st.integers(0, MOST_TRITON_TOKENS - 1))
def test_divisions_by_a_product_are_exact(divisor, n) -> None:
    from linsight.kernels.mixed_state_attention.plan import reciprocal

    assert reciprocal(divisor) < 1 << 31
    assert n * reciprocal(divisor) >> 30 == n // divisor
