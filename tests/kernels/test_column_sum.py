"""The sum of rows: the reference against the equation, Triton against both."""

import random
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linsight.backbones.graph_sums import FastSums
from linsight.kernels import column_sum as package
from linsight.kernels import force
from linsight.kernels.column_sum import MOST_ROWS_LEFT, column_sum, operator

from .conftest import INTERPRETED, compile_whole
from .numerics import RESULT, assert_as_exact_as_eager, distance, poison_memory

CPU = torch.device("cpu")
HALF = (torch.float16, torch.bfloat16)


def rows(count: int, channels: int, device: torch.device = CPU, mean: float = 0.0) -> Tensor:
    return torch.randn(count, channels, device=device) + mean


def test_reference_is_the_equation() -> None:
    torch.manual_seed(0)
    x = rows(9, 5).double()
    torch.testing.assert_close(column_sum(x), torch.einsum("nc->c", x))


def test_reference_gradient() -> None:
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(column_sum, rows(5, 4).double().requires_grad_())


@pytest.mark.parametrize("dtype", HALF)
def test_the_reference_is_rounded_once(dtype) -> None:
    """A running sum in half precision stays at 256 or 2,048 where ones are added to it."""
    x = torch.ones(6000, 3, dtype=dtype)
    for wanted in (None, torch.float32):
        found = column_sum(x, dtype=wanted)
        assert found.dtype == (wanted or dtype)
        assert found.tolist() == [torch.tensor(6000.0).to(found.dtype).item()] * 3
    narrow = column_sum(torch.full((100, 1), 1 + 2**-12), dtype=dtype)
    assert narrow.item() == torch.tensor(100 * (1 + 2**-12)).to(dtype).item()


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 4\), expected \(N, C\)"):
        column_sum(torch.zeros(2, 3, 4))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_error_against_float64(mean, dtype, device, seed) -> None:
    """Of sums that cancel, as gradients do, and of sums that grow."""
    shapes = [(700, 40)] if device.type == "cpu" else [(64 * 3136, 96), (64 * 49, 3072)]
    for shape in shapes:
        x = rows(*shape, device, mean)
        slope = torch.randn(shape[1], device=device)
        assert_as_exact_as_eager(column_sum, [x], dtype, slope)


@pytest.mark.triton
def test_random_shapes_and_means(random_cases, device, seed) -> None:
    draw = random.Random(seed)
    for _ in random_cases:
        shape = (
            draw.choice((MOST_ROWS_LEFT + 1, 640, 1000, 2049)),
            draw.choice((1, 3, 24, 64, 96, 200)),
        )
        mean = draw.choice((0.0, 20.0))
        print(shape, mean)
        x = rows(*shape, device, mean).abs()
        assert_as_exact_as_eager(column_sum, [x], torch.float32, torch.randn(shape[1]).to(device))


@pytest.mark.triton
@pytest.mark.parametrize("shape", [(0, 7), (1, 7), (64, 16), (65, 130), (130, 0)])
def test_few_rows_and_none(shape, device, seed) -> None:
    """The kernels take them, too, as a convolution's gradient gives them."""
    x = rows(*shape, device).bfloat16()
    found = operator.run_sum(x, torch.float32)
    torch.testing.assert_close(found, x.float().sum(0))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", HALF)
def test_the_result_is_rounded_once(dtype, device, seed) -> None:
    x = rows(900, 24, device, 1.0).to(dtype)
    exact = x.double().sum(0)
    with force("triton"):
        wide, narrow = column_sum(x, dtype=torch.float32), column_sum(x)
    assert (wide.dtype, narrow.dtype) == (torch.float32, dtype)
    assert distance(wide, exact) < 1e-6
    if not INTERPRETED:  # which rounds bfloat16 towards zero
        assert torch.equal(narrow, wide.to(dtype))
    assert distance(narrow, exact) <= RESULT * torch.finfo(dtype).eps


@pytest.mark.triton
def test_every_element_is_written(device, monkeypatch) -> None:
    poison_memory(monkeypatch)
    x = rows(1500, 72, device).bfloat16()
    with force("triton"):
        assert column_sum(x).isfinite().all()


@pytest.mark.triton
def test_nothing_beyond_the_rows_is_read(device) -> None:
    """Rows and columns around a tensor, and after the last tile, are no part of its sums."""
    memory = torch.full((600 * 24 + 4096,), float("nan"), device=device, dtype=torch.float16)
    x = memory[2048 : 2048 + 600 * 24].view(600, 24).fill_(0.5)
    with force("triton"):
        assert column_sum(x).tolist() == [300.0] * 24


@pytest.mark.triton
def test_other_strides(device, seed) -> None:
    x = rows(40, 600, device).t()
    with force("triton"):
        torch.testing.assert_close(column_sum(x), x.sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.triton
def test_what_the_kernels_take(device, monkeypatch) -> None:
    """Many rows of 32 or 16 bits, to a result of as many."""
    taken = []
    monkeypatch.setattr(package.operator, "column_sum", lambda x, dtype: taken.append(len(x)))
    many = MOST_ROWS_LEFT + 1
    x = torch.zeros(many, 2, device=device)
    with force("triton"):
        column_sum(x)
        column_sum(x.half(), dtype=torch.bfloat16)
        assert column_sum(x[1:]).tolist() == [0, 0]
        assert column_sum(x, dtype=torch.float64).dtype == torch.float64
        assert column_sum(x.double()).dtype == torch.float64
    with force("reference"):
        column_sum(x)
    assert taken == [many, many]


@pytest.mark.triton
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(600, 24), (3, 200, 24), (2, 20, 15, 24)], ids=str)
def test_the_gradient_of_a_bias(shape, dtype, device, monkeypatch, seed) -> None:
    """On a GPU PyTorch differentiates in threads of its own, which the mode reaches."""
    taken = []
    run = package.operator.column_sum
    monkeypatch.setattr(
        package.operator, "column_sum", lambda *args: taken.append(args[0].shape) or run(*args)
    )
    bias = torch.zeros(24, device=device, requires_grad=True)
    x, slope = (torch.randn(shape, device=device) for _ in range(2))
    with torch.autocast(device.type, dtype):
        y = F.linear(x, torch.eye(24, device=device), bias)
    found = []
    for mode in (nullcontext(), FastSums()):
        with force("triton"), mode:
            found += torch.autograd.grad(y, bias, slope.to(dtype), retain_graph=True)
    eager, ours = found
    assert taken == [(600, 24)]
    exact = slope.to(dtype).double().flatten(0, -2).sum(0)
    assert ours.dtype == eager.dtype == torch.float32
    floor = torch.finfo(dtype).eps / 2
    slack = 2.0 if INTERPRETED and dtype == torch.bfloat16 else 1.0
    assert distance(ours, exact) <= slack * RESULT * max(distance(eager, exact), floor)


@pytest.mark.triton
def test_more_than_31_bits_of_elements(device) -> None:
    if device.type == "cpu":
        pytest.skip("takes 4 GiB of a GPU's memory")
    x = torch.zeros(2**31 // 64 + 70, 64, dtype=torch.float16, device=device)
    x[-1] = 3.0
    with force("triton"):
        assert column_sum(x).tolist() == [3.0] * 64


@pytest.mark.triton
def test_compiles_without_a_graph_break(device) -> None:
    whole = compile_whole(column_sum)
    for count in (600, 601, 700):
        x = rows(count, 16, device).requires_grad_()
        with force("triton"):
            results = [function(x) for function in (column_sum, whole)]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)
        gradients = [torch.autograd.grad(y.square().sum(), x) for y in results]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-3)
