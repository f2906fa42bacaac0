"""Agent attention: the reference against the equations, the Triton kernels against both."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linsight.kernels import force
from linsight.kernels.agent_attention import agent_attention
from linsight.kernels.agent_attention.reference import averages

from .conftest import INTERPRETED, compile_whole
from .numerics import assert_as_exact_as_eager, assert_empty, distance, leaves, poison_memory

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter, blocks so small that few tokens and agents have several."""
    if INTERPRETED:
        from linsight.kernels.agent_attention import plan

        tile = plan.Tile(block=16, warps=1, stages=1, resident=2, least=16)
        blocks = plan.Blocks(agents=16, split=tile, chunk=tile)
        monkeypatch.setattr(plan, "choose_blocks", lambda *args: blocks)


def case(
    size: tuple[int, int],
    grid: tuple[int, int],
    heads: int,
    width: int,
    device: torch.device,
    prefix: int = 0,
    batch: int = 1,
    kernel: int = 3,
) -> list[Tensor]:
    tokens, channels = prefix + size[0] * size[1], heads * width
    return [
        torch.randn(batch, tokens, 3 * channels, device=device),
        torch.randn(2, heads, grid[0] * grid[1], tokens, device=device),
        torch.randn(channels, 1, kernel, kernel, device=device) / kernel,
        torch.randn(channels, device=device),
    ]


def operator(heads: int, size: tuple[int, int], grid: tuple[int, int]):
    def function(
        projection: Tensor, bias: Tensor, weight: Tensor, weight_bias: Tensor | None = None
    ) -> Tensor:
        return agent_attention(
            projection, bias, weight, weight_bias, heads=heads, size=size, grid=grid
        )

    return function


@pytest.mark.parametrize(("length", "cells"), [(56, 3), (14, 9), (14, 7), (7, 7), (5, 9), (1, 4)])
def test_averages_are_adaptive_pooling(length: int, cells: int) -> None:
    x = torch.randn(2, length, dtype=torch.float64)
    pooled = x @ averages(length, cells, x.dtype, x.device).T
    torch.testing.assert_close(pooled, F.adaptive_avg_pool1d(x, cells))


@pytest.mark.parametrize("prefix", [0, 1])
def test_reference_is_the_equation(prefix: int) -> None:
    torch.manual_seed(0)
    size, grid, heads, width = (5, 4), (2, 3), 2, 8
    projection, bias, weight, weight_bias = (
        x.double() for x in case(size, grid, heads, width, torch.device("cpu"), prefix, 2)
    )
    y = operator(heads, size, grid)(projection, bias, weight, weight_bias)
    for image in range(2):
        q, k, v = projection[image].chunk(3, -1)
        pooled = F.adaptive_avg_pool2d(q[prefix:].T.unflatten(1, size), grid).flatten(1).T
        heads_out = []
        for h in range(heads):
            own = slice(h * width, (h + 1) * width)
            a = pooled[:, own]
            first = (a @ k[:, own].T / width**0.5 + bias[0, h]).softmax(-1)
            second = (q[:, own] @ a.T / width**0.5 + bias[1, h].T).softmax(-1)
            heads_out.append(second @ (first @ v[:, own]))
        local = F.conv2d(
            v[prefix:].T.unflatten(1, size)[None], weight, weight_bias, padding=1, groups=16
        )
        wanted = torch.cat(heads_out, -1)
        wanted[prefix:] += local[0].flatten(1).T
        torch.testing.assert_close(y[image], wanted)


@pytest.mark.parametrize("prefix", [0, 1])
def test_reference_gradient(prefix: int) -> None:
    torch.manual_seed(0)
    tensors = [
        x.double().requires_grad_() for x in case((3, 4), (2, 2), 2, 4, torch.device("cpu"), prefix)
    ]
    assert torch.autograd.gradcheck(operator(2, (3, 4), (2, 2)), tensors, fast_mode=True)


def test_errors_name_the_argument() -> None:
    projection, bias, weight, _ = case((3, 4), (2, 2), 2, 8, torch.device("cpu"))
    with pytest.raises(ValueError, match="multiple of heads = 5"):
        operator(5, (3, 4), (2, 2))(projection, bias, weight)
    with pytest.raises(ValueError, match=r"size is \(5, 4\), but projection has only 12 tokens"):
        operator(2, (5, 4), (2, 2))(projection, bias, weight)
    with pytest.raises(ValueError, match=r"bias has shape .* expected \(2, 2, 6, 12\)"):
        operator(2, (3, 4), (2, 3))(projection, bias, weight)
    with pytest.raises(ValueError, match=r"weight has shape .* expected \(16, 1, k, k\)"):
        operator(2, (3, 4), (2, 2))(projection, bias, weight[:8])


@pytest.mark.triton
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_against_float64(dtype, prefix, device, seed) -> None:
    small = device.type == "cpu"
    if small:
        size, grid, heads, width, batch = (5, 7), (3, 3), 1 + prefix, 16, 2 - prefix
    else:
        size, grid, heads, width, batch = (56, 56), (7, 7), 2, 64, 8
    tensors = case(size, grid, heads, width, device, prefix, batch)
    slope = torch.randn(*tensors[0].shape[:2], heads * width, device=device)
    assert_as_exact_as_eager(operator(heads, size, grid), tensors, dtype, slope)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_more_agents_than_a_block(dtype, device, seed) -> None:
    # More than the interpreter's tiles, and on a GPU than 128; more, too, than there are tokens.
    small = device.type == "cpu"
    size, grid, width = ((3, 7), (5, 5), 16) if small else ((20, 33), (28, 28), 64)
    tensors = case(size, grid, 1, width, device, 1, 1 if small else 2)
    slope = torch.randn(*tensors[0].shape[:2], width, device=device)
    assert_as_exact_as_eager(operator(1, size, grid), tensors, dtype, slope)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("width", "dtype"), [(24, torch.float16), (32, torch.float32), (96, torch.float16)]
)
def test_head_widths(width, dtype, device, seed) -> None:
    size, grid = (4, 5), (3, 3)
    tensors = case(size, grid, 1, width, device)
    slope = torch.randn(*tensors[0].shape[:2], width, device=device)
    assert_as_exact_as_eager(operator(1, size, grid), tensors, dtype, slope)


@pytest.mark.triton
def test_random_shapes(random_cases, device, seed) -> None:
    draw = random.Random(seed)
    small = device.type == "cpu"
    for _ in random_cases:
        size = (draw.choice((1, 5, 7)), draw.choice((1, 3, 5 if small else 29)))
        grid = draw.choice(((1, 1), (3, 3), (2, 4), (4, 4)))
        heads, width = draw.choice((1, 2)), draw.choice((16, 32, 48))
        prefix, kernel, batch = draw.choice((0, 2)), draw.choice((3, 5)), draw.choice((1, 2))
        print(size, grid, heads, width, prefix, kernel, batch)
        tensors = case(size, grid, heads, width, device, prefix, batch, kernel)
        slope = torch.randn(*tensors[0].shape[:2], heads * width, device=device)
        if draw.random() < 0.5:
            tensors.pop()
        function = operator(heads, size, grid)
        assert_as_exact_as_eager(function, tensors, draw.choice(DTYPES[:2]), slope)


@pytest.mark.triton
def test_strided_projection(device, seed) -> None:
    """Of a batch that a larger tensor holds, with a stride for every axis."""
    size, grid = (4, 5), (2, 2)
    tensors = case(size, grid, 2, 16, device, 1, 2)
    larger = torch.randn(2, 30, 120, device=device)
    tensors[0] = larger[:, 3:24, 8:104]
    slope = torch.randn(2, 21, 32, device=device)
    assert_as_exact_as_eager(operator(2, size, grid), tensors, torch.float32, slope)


@pytest.mark.triton
def test_a_bias_with_strides(device, seed) -> None:
    """A bias that is a column of a matrix."""
    size, grid = (4, 5), (2, 2)
    *tensors, bias = case(size, grid, 2, 16, device, 1)
    tensors.append(bias.repeat_interleave(3)[::3])
    slope = torch.randn(1, 21, 32, device=device)
    assert_as_exact_as_eager(operator(2, size, grid), tensors, torch.float32, slope)


@pytest.mark.triton
def test_no_images(device) -> None:
    """An empty result, and gradients of zero."""
    tensors = case((3, 4), (2, 2), 2, 16, device, 1, batch=0)
    assert_empty(operator(2, (3, 4), (2, 2)), tensors, (0, 13, 32))


@pytest.mark.triton
@pytest.mark.parametrize(("size", "grid"), [((0, 4), (2, 2)), ((3, 4), (2, 0))])
def test_averages_of_nothing_are_refused(size, grid, device) -> None:
    with force("triton"), pytest.raises(ValueError, match=r"size is .* expected sides of at least"):
        operator(2, size, grid)(*case(size, grid, 2, 16, device, 1))


@pytest.mark.triton
def test_large_values_and_zeros(device, seed) -> None:
    size, grid = (6, 5), (3, 3)
    tensors = case(size, grid, 1, 32, device, 1)
    tensors[0].mul_(7).clamp_(-20, 20)[:, ::3] = 0
    slope = torch.randn(*tensors[0].shape[:2], 32, device=device)
    function = operator(1, size, grid)
    # Scores reach hundreds, and a softmax between two of them is off by as many roundings.
    for dtype, roundings in ((torch.float32, 100), (torch.float16, 1)):
        assert_as_exact_as_eager(function, tensors, dtype, slope, roundings)


@pytest.mark.triton
def test_half_precision_does_not_overflow_with_tokens(device) -> None:
    """The gradient of what the agents aggregate grows with N; no operand of float16 may."""
    side = 12 if device.type == "cpu" else 224
    projection, *tables = case((side, side), (1, 1), 1, 16, device)
    projection = projection.half().requires_grad_()
    with force("triton"):
        y = operator(1, (side, side), (1, 1))(projection, *tables)
    (gradient,) = torch.autograd.grad(y, projection, torch.full_like(y, 50.0))
    assert gradient.isfinite().all()


@pytest.mark.triton
def test_every_element_is_written(device, monkeypatch) -> None:
    poison_memory(monkeypatch)
    for grid in ((2, 3), (5, 5)):
        tensors = leaves(case((3, 7), grid, 2, 24, device, 1, 1), torch.float32)
        with force("triton"):
            y = operator(2, (3, 7), grid)(*tensors)
            gradients = torch.autograd.grad(y.sum(), tensors)
        assert all(x.isfinite().all() for x in (y, *gradients))


@pytest.mark.triton
def test_registration(device) -> None:
    projection, bias, weight, weight_bias = (
        x.requires_grad_() for x in case((2, 3), (2, 2), 1, 16, device, 1)
    )
    for shift in (weight_bias, None):
        torch.library.opcheck(
            torch.ops.linsight.agent_attention.default,
            (projection, bias, weight, shift, 1, 2, 3, 2, 2),
        )


@pytest.mark.triton
@pytest.mark.slow
def test_compiles_without_a_graph_break(device) -> None:
    _, _, weight, weight_bias = (x.requires_grad_() for x in case((1, 1), (2, 2), 2, 16, device))

    def function(x: Tensor, bias: Tensor) -> Tensor:
        size = (bias.shape[-2], bias.shape[-1])
        bias = bias.flatten(-2)
        projection = x.flatten(1, 2)
        return agent_attention(
            projection.cos(), bias, weight, weight_bias, heads=2, size=size, grid=(2, 2)
        ).sin()

    whole = compile_whole(function)
    for size in ((2, 3), (3, 3), (4, 2)):
        x = torch.randn(1, *size, 96, device=device, requires_grad=True)
        bias = torch.randn(2, 2, 4, *size, device=device, requires_grad=True)
        with force("triton"):
            y, z = function(x, bias), whole(x, bias)
            torch.testing.assert_close(z, y)
            inputs = (x, bias, weight, weight_bias)
            for ours, eager in zip(
                *(torch.autograd.grad(r.square().sum(), inputs) for r in (z, y)), strict=True
            ):
                torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.triton
def test_autocast_takes_float32_tables(device) -> None:
    projection, bias, weight, weight_bias = case((3, 5), (2, 2), 2, 16, device, 1)
    projection = projection.bfloat16().requires_grad_()
    tables = [x.requires_grad_() for x in (bias, weight, weight_bias)]
    results = []
    for choice in ("reference", "triton"):
        with force(choice), torch.autocast(device.type, torch.bfloat16):
            y = operator(2, (3, 5), (2, 2))(projection, *tables)
        results.append([y, *torch.autograd.grad(y.float().sum(), (projection, *tables))])
    for eager, ours in zip(*results, strict=True):
        assert ours.dtype == eager.dtype
        assert distance(ours, eager.double()) < 0.02
