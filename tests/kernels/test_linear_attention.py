"""Linear attention: the reference against the equations, the Triton kernels against both."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from linsight.kernels import force
from linsight.kernels.linear_attention import linear_attention, plan
from linsight.kernels.rotary import rotary_tables

from .conftest import compile_whole
from .numerics import assert_as_exact_as_eager, distance, leaves, outcome, poison_memory

FEATURES = ("elu_plus_one", "relu", "exp", "identity", "norm_aware")
WEIGHTS = ("uniform", "global_query")
READOUTS = ("normalized", "summed", "floored", "magnitude_aware", "subtractive")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def norm_aware(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """NaLaFormer's features of one head, (N, D) to (N, 2 D)."""
    norm = q.norm(dim=-1, keepdim=True)
    halves = [(x.clamp(min=0) / norm) ** (3 * (0.5 + norm.tanh())) for x in (q, -q)]
    return torch.cat(halves, -1), torch.cat([x.clamp(min=0) for x in (k**3, -(k**3))], -1)


def direct(q: Tensor, k: Tensor, v: Tensor, feature: str, weights: str, readout: str) -> Tensor:
    """One head, token by token: q, k, v are (N, D)."""
    phi = {
        "elu_plus_one": lambda x: torch.nn.functional.elu(x) + 1,
        "relu": torch.relu,
        "exp": torch.exp,
        "identity": lambda x: x,
    }.get(feature)
    f, g = norm_aware(q, k) if feature == "norm_aware" else (phi(q), phi(k))
    tokens, width = q.shape
    p = torch.full((tokens,), 1 / tokens, dtype=q.dtype)
    if weights == "global_query":
        p = (g @ f.mean(0) / width**0.5).softmax(0)
    similarity = (f @ g.T) * p  # (tokens, tokens): what the operator never forms
    n = similarity.sum(1, keepdim=True)
    if readout == "normalized":
        return similarity @ v / (n + 1e-6)
    if readout == "summed":
        return similarity @ v / (n + 1e-6 / tokens)
    if readout == "floored":
        return similarity @ v / n.clamp(min=100 / tokens)
    s = width**-0.5
    if readout == "magnitude_aware":
        beta = 1 + 1 / (s * n + 1e-6)
        return beta * s * (similarity @ v) - s * n * v.mean(0)
    return s * (similarity @ v) - (s * n - 1) * v.mean(0)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("readout", READOUTS)
def test_reference_is_the_equation(feature: str, weights: str, readout: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 7, 3, 8, dtype=torch.float64)
    options = {"feature_map": feature, "key_weights": weights, "readout": readout}
    y = linear_attention(q, k, v, **options)
    for b in range(2):
        for h in range(3):
            head = direct(q[b, :, h], k[b, :, h], v[b, :, h], feature, weights, readout)
            torch.testing.assert_close(y[b, :, h], head, rtol=1e-9, atol=1e-9)
    local, gate = torch.randn(2, 2, 7, 3, 8, dtype=torch.float64)
    gated = linear_attention(q, k, v, **options, local=local, gate=gate)
    torch.testing.assert_close(gated, (y + local) * gate)


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("weights", ["uniform", "global_query"])
def test_reference_of_no_tokens(weights: str, readout: str) -> None:
    x = torch.randn(2, 0, 1, 16, requires_grad=True)
    y = linear_attention(x, x, x, key_weights=weights, readout=readout)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad is not None


def test_norm_aware_attention_is_the_formula() -> None:
    """NaLaFormer's attention, the halves of its features turned each for itself."""
    torch.manual_seed(0)
    size, width = (3, 5), 8
    q, k, v = torch.randn(3, 1, 15, 2, width, dtype=torch.float64)
    tables = rotary_tables(size, width, q.dtype, q.device)
    y = linear_attention(q, k, v, feature_map="norm_aware", rotary=tables)

    frequency = 10000.0 ** -torch.tensor([0.0, 1.0])
    row, column = torch.arange(15) // 5, torch.arange(15) % 5
    angle = torch.cat([place[:, None] * frequency for place in (row, column)], -1).double()
    phase = torch.polar(torch.ones_like(angle), angle)

    def turn(x: Tensor) -> Tensor:  # pairs of channels as complex numbers
        halves = [torch.view_as_complex(h.unflatten(-1, (-1, 2))) * phase for h in x.chunk(2, -1)]
        return torch.cat([torch.view_as_real(h).flatten(-2) for h in halves], -1)

    for head in range(2):
        f, g = norm_aware(q[0, :, head], k[0, :, head])
        z = 1 / ((f @ g.T / 15).sum(1, keepdim=True) + 1e-6)
        expected = z * (turn(f) @ turn(g).T / 15) @ v[0, :, head]
        torch.testing.assert_close(y[0, :, head], expected, rtol=1e-6, atol=1e-6)


def test_constant_values_come_back() -> None:
    # The weights of a query sum to one but under a floor, so equal values give that value.
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 9, 2, 8, dtype=torch.float64)
    v = torch.full_like(q, 3.0)
    for readout in set(READOUTS) - {"floored"}:
        y = linear_attention(q, k, v, readout=readout)
        torch.testing.assert_close(y, v, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("feature", "weights", "readout"),
    [
        ("elu_plus_one", "global_query", "normalized"),
        ("elu_plus_one", "uniform", "magnitude_aware"),
        ("identity", "uniform", "subtractive"),
        ("exp", "global_query", "normalized"),
        ("norm_aware", "uniform", "normalized"),
        ("relu", "uniform", "floored"),
        ("relu", "uniform", "summed"),
        ("norm_aware", "global_query", "subtractive"),
    ],
)
def test_reference_gradient(feature: str, weights: str, readout: str) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(1, 6, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(5)]
    rotary = rotary_tables((2, 3), 4, torch.float64, torch.device("cpu"))

    def function(q: Tensor, k: Tensor, v: Tensor, local: Tensor, gate: Tensor) -> Tensor:
        return linear_attention(
            q,
            k,
            v,
            feature_map=feature,
            key_weights=weights,
            readout=readout,
            rotary=rotary,
            local=local,
            gate=gate,
        )

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


def test_errors_name_the_argument() -> None:
    x = torch.randn(1, 6, 2, 4)
    with pytest.raises(ValueError, match=r"query has shape \(6, 2, 4\)"):
        linear_attention(x[0], x, x)
    with pytest.raises(ValueError, match="must have one shape"):
        linear_attention(x, x[:, :3], x)
    with pytest.raises(ValueError, match="gate has shape"):
        linear_attention(x, x, x, gate=x[:, :1])
    with pytest.raises(ValueError, match="feature_map is 'softmax', expected one of elu_plus_one"):
        linear_attention(x, x, x, feature_map="softmax")
    tables = rotary_tables((2, 2), 4, x.dtype, x.device)
    with pytest.raises(ValueError, match="2 x 2 tokens, but query has 6"):
        linear_attention(x, x, x, rotary=tables)


def case(
    size: tuple[int, int],
    heads: int,
    width: int,
    device: torch.device,
    magnitude: float = 1.0,
    batch: int = 1,
) -> list[Tensor]:
    """q, k, v and gate sliced out of one packed projection, and a local branch."""
    tokens = size[0] * size[1]
    packed = torch.randn(batch, tokens, 4, heads, width, device=device).clamp(-20, 20) * magnitude
    local = torch.randn(batch, tokens, heads, width, device=device)
    return [*packed.unbind(2), local]


def operator(size, width, device, rotary=True, **options):
    def function(q, k, v, gate=None, local=None):
        tables = rotary_tables(size, width, q.dtype, device) if rotary else None
        return linear_attention(q, k, v, rotary=tables, gate=gate, local=local, **options)

    return function


def options(feature="elu_plus_one", weights="uniform", readout="normalized"):
    return {"feature_map": feature, "key_weights": weights, "readout": readout}


RALA = options(weights="global_query")
MALA = options(readout="magnitude_aware")
NALA = options("norm_aware")
CASES = [
    *((RALA, dtype) for dtype in DTYPES),
    *((MALA, dtype) for dtype in DTYPES[:2]),
    (options("exp", "uniform", "subtractive"), torch.float32),
    (options("relu", "uniform", "floored"), torch.float32),
    (options("relu", "uniform", "summed"), torch.float32),
    (options("relu", "global_query", "magnitude_aware"), torch.float16),
    *((NALA, dtype) for dtype in DTYPES),
]


@pytest.mark.triton
@pytest.mark.parametrize(("choice", "dtype"), CASES, ids=str)
def test_error_against_float64(choice, dtype, device, seed) -> None:
    size, width = ((3, 11), 32) if device.type == "cpu" else ((56, 56), 64)
    tensors = case(size, 2, width, device)
    slope = torch.randn_like(tensors[0])
    function = operator(size, width, device, **choice)
    assert_as_exact_as_eager(function, tensors, dtype, slope)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("width", "dtype", "choice"),
    [
        (16, torch.float16, RALA),
        (24, torch.float32, RALA),
        (96, torch.float16, RALA),
        (128, torch.float32, RALA),
        (96, torch.float32, NALA),
    ],
    ids=str,
)
def test_head_widths(width, dtype, choice, device, seed) -> None:
    size = (5, 7)
    tensors = case(size, 1, width, device, batch=1)
    slope = torch.randn_like(tensors[0])
    function = operator(size, width, device, **choice)
    assert_as_exact_as_eager(function, tensors, dtype, slope)


@pytest.mark.triton
def test_random_shapes(random_cases, device, seed) -> None:
    draw = random.Random(seed)
    for _ in random_cases:
        size = (draw.choice((5, 7, 11)), draw.choice((1, 3, 13)))
        heads, width = draw.choice((1, 2, 3)), draw.choice((16, 32, 48))
        feature = draw.choice(("elu_plus_one", "relu", "norm_aware"))
        choice = options(feature, draw.choice(WEIGHTS), draw.choice(READOUTS))
        epilogue = draw.choice((0, 1, 2))
        print(size, heads, width, choice, epilogue)
        tensors = case(size, heads, width, device, batch=draw.choice((1, 2)))
        function = operator(size, width, device, draw.random() < 0.5, **choice)
        slope = torch.randn_like(tensors[0])
        dtype = draw.choice(DTYPES[:2])
        assert_as_exact_as_eager(function, tensors[: 3 + epilogue], dtype, slope)


@pytest.mark.triton
def test_one_token(device, seed) -> None:
    # One token attends to itself: the gradients of q and k are zero but for rounding.
    tensors = case((1, 1), 2, 16, device)
    slope = torch.randn_like(tensors[0])
    function = operator((1, 1), 16, device, **RALA)
    ours, expected = (
        outcome(function, tensors, torch.float32, slope, choice)
        for choice in ("triton", "reference")
    )
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.triton
def test_large_values_and_zeros(device, seed) -> None:
    size = (6, 9)
    tensors = case(size, 1, 32, device, magnitude=7.0)
    tensors[0].clamp_(-20, 20)[:, ::3] = 0
    tensors[1].clamp_(-20, 20)[:, ::5] = 0
    function = operator(size, 32, device, **RALA)
    slope = torch.randn_like(tensors[0])
    # Scores reach hundreds, and a softmax between two of them is off by as many roundings.
    for dtype, roundings in ((torch.float32, 100), (torch.float16, 1)):
        assert_as_exact_as_eager(function, tensors, dtype, slope, roundings)
    # A query of all zeros after relu has normaliser zero: 0 / 1e-6, not 0 / 0.
    zeros = [torch.zeros(1, 5, 1, 16, device=device) for _ in range(3)]
    with force("triton"):
        assert linear_attention(*zeros, feature_map="relu").eq(0).all()


@pytest.mark.triton
@pytest.mark.parametrize("choice", [RALA, MALA], ids=["RALA", "MALA"])
def test_bfloat16_where_terms_cancel(choice, device, seed) -> None:
    """The gradient of a nearly one-hot softmax, and MALA's mean value, subtract nearly the same.

    Features rounded to bfloat16 in every product would be seen there: the error of the gradient of
    RALA's keys was up to 15 times what is allowed.
    """
    size = (4, 16)
    function = operator(size, 32, device, **choice)
    for magnitude in (0.3, *[10.0] * 4):
        query, key, value, *_ = case(size, 2, 32, device, magnitude)
        slope = torch.randn_like(query)
        assert_as_exact_as_eager(function, (query, key, value), torch.bfloat16, slope)


@pytest.mark.triton
def test_norm_aware_large_values_and_zeros(device, seed) -> None:
    size = (6, 9)
    tensors = case(size, 1, 32, device, magnitude=7.0)[:3]
    tensors[0].clamp_(-20, 20)[:, ::3] = 0
    tensors[1].clamp_(-20, 20)[:, ::5] = 0
    function = operator(size, 32, device, **NALA)
    slope = torch.randn_like(tensors[0])
    assert_as_exact_as_eager(function, tensors, torch.float16, slope)
    for choice in ("triton", "reference"):
        y, *gradients = outcome(function, tensors, torch.float32, slope, choice)
        assert all(x.isfinite().all() for x in (y, *gradients))
        assert y[:, ::3].eq(0).all()  # a query of zeros has no direction: no features
        assert gradients[0][:, ::3].eq(0).all()


@pytest.mark.triton
@pytest.mark.parametrize("feature", ["elu_plus_one", "relu", "exp", "norm_aware"])
def test_what_is_no_number_stays(feature, device) -> None:
    """As the reference has it: with its query, or with all of the head if it is in a key."""
    for which in range(3):
        tensors = [torch.randn(2, 9, 2, 8, device=device) for _ in range(3)]
        tensors[which][1, 3, 0, 5] = float("nan")
        found = []
        for choice in ("triton", "reference"):
            with force(choice):
                found.append(linear_attention(*tensors, feature_map=feature).isnan())
        assert found[0].any()
        assert torch.equal(*found)


@pytest.mark.triton
def test_every_element_is_written(device, monkeypatch) -> None:
    poison_memory(monkeypatch)
    size = (5, 13)
    for choice in (RALA, MALA, NALA):
        tensors = leaves(case(size, 2, 24, device), torch.float32)
        with force("triton"):
            y = operator(size, 24, device, **choice)(*tensors)
            gradients = torch.autograd.grad(y.sum(), tensors)
        assert all(x.isfinite().all() for x in (y, *gradients))


@pytest.mark.triton
def test_registration(device) -> None:
    q, k, v, gate, local = (x.requires_grad_() for x in case((2, 3), 1, 16, device))
    rows, columns = rotary_tables((2, 3), 16, q.dtype, device)
    torch.library.opcheck(
        torch.ops.linsight.linear_attention.default,
        (q, k, v, rows, columns, local, gate, "elu_plus_one", "global_query", "normalized"),
    )
    torch.library.opcheck(
        torch.ops.linsight.linear_attention.default,
        (q, k, v, None, None, None, None, "norm_aware", "uniform", "magnitude_aware"),
    )


@pytest.mark.triton
@pytest.mark.slow
def test_compiles_without_a_graph_break(device) -> None:
    def function(packed: Tensor) -> Tensor:
        q, k, v, gate = packed.unbind(2)
        options = {"feature_map": "norm_aware", "key_weights": "global_query"}
        return linear_attention(q, k, v, **options, gate=gate) * 2

    whole = compile_whole(function)
    for tokens in (12, 35, 64):
        packed = torch.randn(1, tokens, 4, 2, 16, device=device, requires_grad=True)
        with force("triton"):
            y, z = function(packed), whole(packed)
            slope = torch.randn_like(y)
            torch.testing.assert_close(z, y)
            torch.testing.assert_close(
                *(torch.autograd.grad(result, packed, slope) for result in (z, y))
            )


@pytest.mark.triton
def test_autocast_keeps_the_dtype_of_the_query(device) -> None:
    q, k, v, gate, local = case((4, 5), 2, 16, device)
    q, k, v, gate = (x.bfloat16() for x in (q, k, v, gate))
    for choice in ("reference", "triton"):
        with force(choice), torch.autocast(device.type, torch.bfloat16):
            assert linear_attention(q, k, v, gate=gate, local=local).dtype == torch.bfloat16


@pytest.mark.gpu
def test_beyond_two_to_the_31_elements(device) -> None:
    tokens = 2**31 // (4 * 64) + 1000
    packed = torch.randn(1, tokens, 4, 1, 64, device=device, dtype=torch.bfloat16)
    q, k, v, gate = packed.unbind(2)
    y = linear_attention(q, k, v, gate=gate)
    with torch.no_grad():
        size = 1 << 20  # the same state from the reference, a million tokens at a time
        f, g = (
            x.where(x > 0, x.float().exp() - 1).float() + 1 for x in (q[0, -64:, 0], k[0, :, 0])
        )
        state = sum(
            g[i : i + size].T.double() @ v[0, i : i + size, 0].double()
            for i in range(0, tokens, size)
        )
        expected = (f.double() @ state) / (f.double() @ g.double().sum(0))[:, None]
    expected = expected * gate[0, -64:, 0].double()
    assert distance(y[0, -64:, 0], expected) < 0.01


@given(width=st.integers(1, 1 << 16), token=st.integers(0, (1 << 30) - 1))
def test_rows_of_a_map_are_found_by_a_product(width, token):
    found, reciprocal, shift, *_ = plan.table_sizes((1, width), 64)
    assert found == width
    assert reciprocal < 1 << 31
    assert token * reciprocal >> shift == token // width
