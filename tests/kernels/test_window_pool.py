"""Averages over squares: the reference against loops, the Triton kernels against both."""

import random

import pytest
import torch
from torch import Tensor

from linsight.kernels import force
from linsight.kernels.window_pool import window_pool

from .conftest import compile_whole
from .numerics import assert_as_exact_as_eager, leaves, poison_memory

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def pool(x: Tensor, heads: int = 2, window: int = 3, dilations: tuple = (1, 2)) -> Tensor:
    """All shares' averages in one tensor."""
    return torch.stack(window_pool(x, heads=heads, window=window, dilations=dilations))


def slice_of_map(
    height: int, width: int, channels: int, device: torch.device | str = "cpu", batch: int = 2
) -> Tensor:
    """The last channels of a wider map."""
    return torch.randn(batch, height, width, channels + 5, device=device)[..., 5:]


def reflect(place: int, side: int) -> int:
    """Walk `place` steps from the first token, turning round at the ends."""
    token, step = 0, 1
    for _ in range(place):
        if not 0 <= token + step < side:
            step = -step
        if side > 1:
            token += step
    return token


@pytest.mark.parametrize("size", [(7, 5), (6, 6), (2, 1), (3, 14)])
def test_reference_is_the_formula(size: tuple[int, int]) -> None:
    x = slice_of_map(*size, 12, batch=1).double()
    got = pool(x)
    for share, dilation in enumerate((1, 2)):
        extent = 2 * dilation + 1
        down, across = (-(-side // extent) for side in size)
        for place in range(9):
            for head in range(2):
                row = []
                for i in range(down):
                    for j in range(across):
                        y = reflect(i * extent + place // 3 * dilation, size[0])
                        z = reflect(j * extent + place % 3 * dilation, size[1])
                        start = share * 6 + head * 3
                        row += x[0, y, z, start : start + 3].tolist()
                averages = torch.tensor(row, dtype=x.dtype).view(3, down * across).mean(1)
                torch.testing.assert_close(got[share, 0, place, head], averages)


def test_reference_gradient() -> None:
    x = slice_of_map(5, 4, 8, batch=1).double().requires_grad_()
    assert torch.autograd.gradcheck(pool, x)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(2, 5, 4, 6\), expected .* C a multiple"):
        pool(slice_of_map(5, 4, 6))
    with pytest.raises(ValueError, match="x has shape"):
        pool(slice_of_map(5, 4, 8)[0])
    with pytest.raises(ValueError, match="window is 0"):
        pool(slice_of_map(5, 4, 8), window=0)
    with pytest.raises(ValueError, match=r"dilations are \(1, 0\)"):
        pool(slice_of_map(5, 4, 8), dilations=(1, 0))


def check(x: Tensor, dtype: torch.dtype, **options) -> None:
    def function(x: Tensor) -> Tensor:
        return pool(x, **options)

    assert_as_exact_as_eager(function, [x], dtype, torch.randn_like(function(x)))


# The first size is for the interpreter.
@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_against_float64(dtype, device, seed) -> None:
    small = device.type == "cpu"
    x = slice_of_map(11, 9, 20, device) if small else slice_of_map(56, 56, 112, device)
    check(x, dtype, heads=2, window=3 if small else 7, dilations=(1, 2 if small else 8))


@pytest.mark.triton
def test_random_shapes(random_cases, device, seed) -> None:
    draw = random.Random(seed)
    for _ in random_cases:
        size = draw.choice((1, 2, 3, 6, 9)), draw.choice((1, 4, 7, 8))
        heads, depth = draw.choice((1, 3)), draw.choice((1, 5, 14))
        window, dilations = draw.choice((1, 2, 3)), draw.choice(((1,), (3,), (1, 2), (2, 1, 4)))
        print(size, heads, depth, window, dilations)
        x = slice_of_map(*size, len(dilations) * heads * depth, device, batch=draw.choice((1, 2)))
        check(x, torch.float32, heads=heads, window=window, dilations=dilations)


@pytest.mark.triton
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3)])
def test_a_map_smaller_than_its_window_is_reflected_often(size, device, seed) -> None:
    check(slice_of_map(*size, 8, device), torch.float32, heads=2, window=5, dilations=(1, 3))


@pytest.mark.triton
def test_strides(device, seed) -> None:
    """Rows that no single step leads along, and channels that lie apart."""
    x = torch.randn(2, 6, 5, 8, device=device)
    check(x.transpose(1, 2), torch.float32)
    check(x.mT, torch.float32, heads=1, dilations=(1,))


@pytest.mark.triton
def test_what_is_no_number_stays_in_its_average(device) -> None:
    x = torch.zeros(1, 4, 4, 4, device=device)
    x[0, 1, 0, 2] = float("nan")
    with force("triton"):
        (y,) = window_pool(x, heads=1, window=2, dilations=(1,))
    # Place (1, 0) of the first square; channel 2 is in the third run of four entries of its table,
    # which begins with the first square's four channels.
    assert y.isnan().nonzero().tolist() == [[0, 2, 0, 0]]


@pytest.mark.triton
def test_no_images(device) -> None:
    x = torch.zeros(0, 5, 4, 8, device=device, requires_grad=True)
    with force("triton"):
        y = pool(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.shape == (2, 0, 9, 2, 2)
    assert gradient.shape == x.shape


@pytest.mark.triton
def test_every_element_is_written(device, monkeypatch) -> None:
    poison_memory(monkeypatch)
    # A square of side 5 reads 9 of its tokens; the gradient of the others is zero.
    (x,) = leaves([slice_of_map(7, 9, 12, device)], torch.float32)
    with force("triton"):
        y = pool(x, dilations=(2, 2))
        (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all()
    assert gradient.isfinite().all()
    assert not gradient[:, 1].any()


@pytest.mark.triton
def test_registration(device) -> None:
    x = slice_of_map(5, 4, 8, device).requires_grad_()
    torch.library.opcheck(torch.ops.linsight.window_pool.default, (x, 2, 3, [1, 2]))


@pytest.mark.triton
@pytest.mark.slow
def test_compiles_without_a_graph_break(device) -> None:
    def function(x: Tensor) -> Tensor:
        return pool(x) * 2

    whole = compile_whole(function)
    for size in ((5, 4), (8, 9), (6, 6)):
        x = slice_of_map(*size, 8, device).requires_grad_()
        with force("triton"):
            y, z = function(x), whole(x)
            torch.testing.assert_close(z, y)
            gradients = [torch.autograd.grad(t.sin().sum(), x)[0] for t in (y, z)]
            torch.testing.assert_close(*gradients)
