"""Softmax attention of parts: the reference against the equation, the Triton kernels against it."""

import random

import pytest
import torch
from torch import Tensor

from linsight.kernels import force
from linsight.kernels import softmax_attention as package
from linsight.kernels.softmax_attention import align, attention_of_parts, softmax_attention

from .conftest import compile_whole
from .numerics import assert_as_exact_as_eager, leaves, poison_memory

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def case(
    tokens: int,
    keys: int,
    heads: int,
    width: int,
    device: torch.device | str = "cpu",
    *,
    single: int = 4,
    reduced: int = 5,
    shares: int = 2,
    batch: int = 2,
    magnitude: float = 1.0,
) -> list[Tensor]:
    """Queries out of a wider tensor, and keys and values and what is added of all parts."""
    channels = single + shares * heads * width
    query = torch.randn(batch, tokens, channels + 3, device=device)[..., 3:]
    tensors = [magnitude * query]
    for m, h, d in ((reduced, 1, single), *[(keys, heads, width)] * shares):
        tensors += (torch.randn(batch, m, h, n * d, device=device) for n in (2, 1))
    return tensors


def attend(query: Tensor, *parts: Tensor) -> Tensor:
    """The operator, with its parts one after the other."""
    whole, *shares = zip(parts[::2], parts[1::2], strict=True)
    return attention_of_parts(query, whole, shares)


def test_reference_is_the_equation() -> None:
    torch.manual_seed(0)
    query, *parts = (x.double() for x in case(6, 3, 2, 5))
    y = attend(query, *parts)
    start = 0
    for number in range(3):
        key_value, local = parts[2 * number : 2 * number + 2]
        heads, width = local.shape[2:]
        for h in range(heads):
            # A head's channels of both shares stand side by side in the queries.
            at = 4 + (2 * h + number - 1) * 5 if number else 0
            q, k, v = query[..., at : at + width], *key_value[:, :, h].split(width, -1)
            weights = (q @ k.mT / width**0.5).softmax(-1)
            expected = weights @ (v + local[:, :, h])
            torch.testing.assert_close(y[..., start : start + width], expected)
            start += width
    assert start == y.shape[-1]


def test_reference_gradient() -> None:
    torch.manual_seed(0)
    tensors = [x.double().requires_grad_() for x in case(4, 3, 2, 3, single=2, batch=1)]
    assert torch.autograd.gradcheck(attend, tensors, fast_mode=True)


def test_other_attentions_take_its_place() -> None:
    query, *parts = case(6, 3, 2, 5)
    whole, *shares = zip(parts[::2], parts[1::2], strict=True)
    seen = []

    def attention(number: int):
        def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seen.append((number, *q.shape[1:], k.shape[2]))
            return softmax_attention(q, k, v)

        return function

    y = attention_of_parts(query, whole, shares, [attention(number) for number in range(3)])
    torch.testing.assert_close(y, attend(query, *parts))
    assert seen == [(0, 1, 6, 4, 5), (1, 2, 6, 5, 3), (2, 2, 6, 5, 3)]


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 3, 5, 4),
        torch.randn(2, 5, 3, 7)[..., 3:].transpose(1, 2),
        torch.randn(2, 5, 3, 6).transpose(1, 2),
        # Padding keeps the steps of a map whose channels lie last, as this may be one.
        torch.randn(1, 1, 7, 1).as_strided((1, 1, 7, 1), (7, 1, 1, 1)),
    ],
)
def test_rows_begin_at_multiples_of_16_bytes(x):
    y = align(x)
    assert all(step % 4 == 0 for step in (y.storage_offset(), *y.stride()[:-1]))
    torch.testing.assert_close(y[..., : x.shape[-1]], x)
    assert not y[..., x.shape[-1] :].any()


def test_errors_name_the_argument() -> None:
    query, *parts = case(6, 3, 2, 5)
    with pytest.raises(ValueError, match=r"query has shape \(6, 24\)"):
        attend(query[0], *parts)
    with pytest.raises(ValueError, match="query has 23 channels, expected 24"):
        attend(query[..., 1:], *parts)
    with pytest.raises(ValueError, match=r"whole has shapes \(2, 5, 1, 7\) and \(2, 5, 1, 4\)"):
        attend(query, parts[0][..., 1:], *parts[1:])
    with pytest.raises(ValueError, match=r"shares\[1\] has shapes .*, expected \(2, 3, 2, 10\)"):
        attend(query, *parts[:4], *(x[:, 1:] for x in parts[4:]))
    with pytest.raises(ValueError, match="shares is empty"):
        attend(query, *parts[:2])


# The first numbers are for the interpreter.
@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_against_float64(dtype, device, seed) -> None:
    if device.type == "cpu":
        tensors = case(37, 9, 2, 12, device)
    else:
        tensors = case(3136, 49, 2, 28, device, single=16, reduced=49)
    assert_as_exact_as_eager(attend, tensors, dtype, torch.randn_like(tensors[0]))


@pytest.mark.triton
def test_random_shapes(random_cases, device, seed) -> None:
    draw = random.Random(seed)
    for _ in random_cases:
        shape = (draw.choice((1, 2, 17, 31)), draw.choice((1, 7, 64)), draw.choice((1, 3)))
        width, single = draw.choice((1, 7, 14, 42)), draw.choice((1, 12, 33))
        shares, reduced, batch = draw.choice((1, 2)), draw.choice((1, 6, 64)), draw.choice((1, 2))
        print(shape, width, single, shares, reduced, batch)
        tensors = case(
            *shape, width, device, single=single, reduced=reduced, shares=shares, batch=batch
        )
        assert_as_exact_as_eager(attend, tensors, torch.float32, torch.randn_like(tensors[0]))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [84, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_heads(width, dtype, device, seed) -> None:
    tensors = case(300, 49, 2, width, device, single=96, shares=1)
    assert_as_exact_as_eager(attend, tensors, dtype, torch.randn_like(tensors[0]))


@pytest.mark.triton
def test_large_scores(device, seed) -> None:
    tensors = case(23, 6, 1, 12, device, magnitude=1e3)
    slope = torch.randn_like(tensors[0])
    # A score of thousands is off by as many roundings.
    assert_as_exact_as_eager(attend, tensors, torch.float32, slope, roundings=2000)


@pytest.mark.triton
def test_what_is_no_number_stays_in_its_token_and_part(device) -> None:
    query, *parts = case(5, 3, 1, 4, device)
    query[1, 2, 9] = float("nan")  # of the second share
    with force("triton"):
        y = attend(query, *parts)
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[1, 2, 8:] = True
    assert torch.equal(y.isnan(), expected)


@pytest.mark.triton
def test_a_whole_of_many_keys_and_shares_by_the_kernels(device, seed, monkeypatch) -> None:
    taken = []
    run = package.operator.attention_of_parts

    def watch(query: Tensor, *parts: Tensor | None) -> Tensor:
        taken.append([x if x is None else x.shape[1] for x in (query, *parts)])
        return run(query, *parts)

    monkeypatch.setattr(package.operator, "attention_of_parts", watch)
    tensors = case(11, 4, 2, 5, device, reduced=65)
    assert_as_exact_as_eager(attend, tensors, torch.float32, torch.randn_like(tensors[0]))
    assert taken
    assert all(call == [11, None, None, 4, 4, 4, 4] for call in taken)


@pytest.mark.triton
@pytest.mark.parametrize("options", [{"keys": 65}, {"width": 129}, {"shares": 3}])
def test_other_parts_run_the_reference(options, device, monkeypatch) -> None:
    monkeypatch.setattr(package.operator, "attention_of_parts", None)
    tensors = case(**{"tokens": 3, "keys": 4, "heads": 1, "width": 5, **options}, device=device)
    with force("triton"):
        assert attend(*tensors).shape == tensors[0].shape


@pytest.mark.triton
def test_dtypes_that_differ_run_the_reference(device, monkeypatch) -> None:
    monkeypatch.setattr(package.operator, "attention_of_parts", None)
    query, *parts = case(3, 4, 1, 5, device)
    parts[3] = parts[3].bfloat16()
    with force("triton"):
        assert attend(query, *parts).dtype == torch.float32


@pytest.mark.triton
@pytest.mark.parametrize("width", [5, 8])
def test_softmax_attention_of_rows_at_any_address(width, device) -> None:
    """PyTorch's float32 kernels for recent GPUs refuse such, which are copied."""
    x = torch.randn(2, 3, 7, 3 * width + 1, device=device)[..., 1:]
    tensors = x.split(width, -1)
    for copy in map(package.align, tensors):
        assert all(step % 4 == 0 for step in (copy.storage_offset(), *copy.stride()[:-1]))
    y = softmax_attention(*tensors)
    exact = softmax_attention(*(each.double() for each in tensors))
    assert y.shape == (2, 3, 7, width)
    torch.testing.assert_close(y.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.triton
def test_no_tokens(device) -> None:
    tensors = leaves(case(0, 3, 2, 5, device), torch.float32)
    with force("triton"):
        y = attend(*tensors)
        gradients = torch.autograd.grad(y.sum(), tensors)
    assert all(x.shape == y.shape for x, y in zip(gradients, tensors, strict=True))
    assert not any(x.any() for x in gradients)


@pytest.mark.triton
def test_every_element_is_written(device, monkeypatch) -> None:
    poison_memory(monkeypatch)
    for shares in (1, 2):
        tensors = leaves(case(35, 9, 2, 12, device, shares=shares), torch.float32)
        with force("triton"):
            y = attend(*tensors)
            gradients = torch.autograd.grad(y.sum(), tensors)
        assert all(x.isfinite().all() for x in (y, *gradients))


@pytest.mark.triton
def test_strides(device, seed) -> None:
    """Tokens that no single step leads along, and channels that lie apart."""
    tensors = case(5, 3, 2, 5, device)
    tensors[0] = tensors[0].transpose(0, 1).contiguous().transpose(0, 1)
    tensors[1], tensors[3] = (x.mT.contiguous().mT for x in (tensors[1], tensors[3]))
    assert_as_exact_as_eager(attend, tensors, torch.float32, torch.randn_like(tensors[0]))
    tensors[0] = tensors[0].mT.contiguous().mT
    assert_as_exact_as_eager(attend, tensors, torch.float32, torch.randn_like(tensors[0]))


@pytest.mark.triton
def test_registration(device) -> None:
    operator = torch.ops.linsight.attention_of_parts.default
    tensors = [x.requires_grad_() for x in case(6, 3, 2, 5, device)]
    torch.library.opcheck(operator, tensors)
    query = tensors[0].detach()
    torch.library.opcheck(operator, [query[..., :14].requires_grad_(), *tensors[1:5], None, None])
    torch.library.opcheck(operator, [query[..., 4:].requires_grad_(), None, None, *tensors[3:]])


@pytest.mark.triton
@pytest.mark.slow
def test_compiles_without_a_graph_break(device) -> None:
    def function(*tensors: Tensor) -> Tensor:
        return attend(*tensors) * 2

    whole = compile_whole(function)
    for tokens in (12, 35, 64):
        tensors = [x.requires_grad_() for x in case(tokens, 3, 2, 8, device)]
        with force("triton"):
            y, z = function(*tensors), whole(*tensors)
            torch.testing.assert_close(z, y)
            slope = torch.randn_like(y)
            gradients = [torch.autograd.grad(t, tensors, slope) for t in (y, z)]
            for got, expected in zip(*gradients, strict=True):
                torch.testing.assert_close(got, expected)
