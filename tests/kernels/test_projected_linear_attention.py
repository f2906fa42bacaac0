"""The gated mixer core of a packed projection against the two operators it is made of."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from linsight.kernels import force
from linsight.kernels.depthwise_conv2d import depthwise_conv2d
from linsight.kernels.linear_attention import linear_attention
from linsight.kernels.projected_linear_attention import projected_linear_attention
from linsight.kernels.rotary import rotary_tables

from .conftest import compile_whole
from .numerics import assert_as_exact_as_eager, assert_empty

RALA = {"key_weights": "global_query", "readout": "normalized"}
MALA = {"key_weights": "uniform", "readout": "magnitude_aware"}


def case(
    size: tuple[int, int], channels: int, device: torch.device, batch: int = 2, kernel: int = 5
) -> list[Tensor]:
    projection = torch.randn(batch, *size, 4 * channels, device=device)
    weight = torch.randn(channels, 1, kernel, kernel, device=device) / kernel
    return [projection, weight, torch.randn(channels, device=device)]


def operator(
    size: tuple[int, int] | None, width: int, heads: int, options: dict
) -> Callable[..., Tensor]:
    """The operator, with rotary tables of a map of `size` or without any."""

    def function(projection: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        place = projection.dtype, projection.device
        rotary = rotary_tables(size, width, *place) if size else None
        return projected_linear_attention(
            projection, weight, bias, heads=heads, rotary=rotary, **options
        )

    return function


def assert_compiles(function: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor) -> None:
    """Compiled whole, `function` gives the same of packed maps (1, H, W, 128) of three sizes."""
    whole = compile_whole(function)
    for size in ((2, 3), (3, 3), (4, 2)):
        x = torch.randn(1, *size, 128, device=weight.device, requires_grad=True)
        with force("triton"):
            y, z = function(x), whole(x)
            torch.testing.assert_close(z, y)
            for ours, eager in zip(
                *(torch.autograd.grad(r.square().sum(), (x, weight, bias)) for r in (z, y)),
                strict=True,
            ):
                torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [RALA, MALA], ids=["rala", "mala"])
def test_reference_is_the_composition(options: dict) -> None:
    torch.manual_seed(0)
    projection, weight, bias = case((4, 6), 16, torch.device("cpu"))
    rotary = rotary_tables((4, 6), 8, projection.dtype, projection.device)
    q, k, v, gate = (x.reshape(2, 24, 2, 8) for x in projection.chunk(4, -1))
    local = depthwise_conv2d(projection[..., 32:48], weight, bias).reshape(2, 24, 2, 8)
    expected = linear_attention(q, k, v, rotary=rotary, local=local, gate=gate, **options)
    y = projected_linear_attention(projection, weight, bias, heads=2, rotary=rotary, **options)
    torch.testing.assert_close(y, expected.reshape(2, 4, 6, 16))


def test_errors_name_the_argument() -> None:
    projection, weight, bias = case((4, 6), 16, torch.device("cpu"))
    with pytest.raises(ValueError, match="multiple of heads = 3"):
        projected_linear_attention(projection, weight, bias, heads=3)
    with pytest.raises(ValueError, match=r"weight has shape .* expected \(16, 1, k, k\)"):
        projected_linear_attention(projection, weight[:8], bias, heads=2)
    with pytest.raises(ValueError, match="readout is 'mean'"):
        projected_linear_attention(projection, weight, bias, heads=2, readout="mean")


@pytest.mark.triton
@pytest.mark.parametrize(
    ("options", "dtype"),
    [(RALA, torch.float32), (RALA, torch.bfloat16), (MALA, torch.float16)],
    ids=["rala-float32", "rala-bfloat16", "mala-float16"],
)
def test_error_against_float64(options, dtype, device, seed) -> None:
    small = device.type == "cpu"
    size, channels, batch, kernel = ((3, 7), 32, 1, 3) if small else ((56, 56), 128, 4, 5)
    tensors = case(size, channels, device, batch, kernel)
    slope = torch.randn(batch, *size, channels, device=device)
    assert_as_exact_as_eager(operator(size, channels // 2, 2, options), tensors, dtype, slope)


@pytest.mark.triton
def test_random_shapes(random_cases, device, seed) -> None:
    draw = random.Random(seed)
    sides = (1, 3, 5) if device.type == "cpu" else (1, 7, 13, 56)
    for _ in random_cases:
        size, batch = (draw.choice(sides), draw.choice(sides)), draw.choice((1, 2))
        heads, width, kernel = draw.choice((1, 3)), draw.choice((16, 32)), draw.choice((3, 5))
        options, rotated = draw.choice((RALA, MALA)), draw.random() < 0.5
        print(size, batch, heads, width, kernel, options, rotated)
        tensors = case(size, heads * width, device, batch, kernel)
        slope = torch.randn(batch, *size, heads * width, device=device)
        function = operator(size if rotated else None, width, heads, options)
        assert_as_exact_as_eager(function, tensors, torch.float32, slope)


@pytest.mark.triton
def test_a_bias_with_strides(device, seed) -> None:
    """A bias that is a column of a matrix."""
    *tensors, bias = case((3, 4), 32, device, 1, 3)
    tensors.append(bias.repeat_interleave(3)[::3])
    slope = torch.randn(1, 3, 4, 32, device=device)
    assert_as_exact_as_eager(operator((3, 4), 16, 2, RALA), tensors, torch.float32, slope)


@pytest.mark.triton
def test_no_images(device) -> None:
    """An empty result, and gradients of zero."""
    tensors = case((3, 4), 32, device, 0, 3)
    assert_empty(operator((3, 4), 16, 2, RALA), tensors, (0, 3, 4, 32))


@pytest.mark.triton
def test_registration(device) -> None:
    projection, weight, bias = (x.requires_grad_() for x in case((2, 3), 32, device, 1, 3))
    rows, columns = rotary_tables((2, 3), 16, projection.dtype, device)
    torch.library.opcheck(
        torch.ops.linsight.projected_linear_attention.default,
        (projection, weight, bias, rows, columns, 2, "elu_plus_one", *RALA.values()),
    )


@pytest.mark.triton
@pytest.mark.slow
def test_compiles_without_a_graph_break(device) -> None:
    _, weight, bias = (x.requires_grad_() for x in case((1, 1), 32, device, 1, 3))

    def function(x: Tensor) -> Tensor:
        return projected_linear_attention(x.cos(), weight, bias, heads=2, **MALA) * 2

    assert_compiles(function, weight, bias)


@pytest.mark.triton
def test_autocast_takes_float32_weights(device) -> None:
    projection, weight, bias = case((3, 5), 32, device, 1, 3)
    projection = projection.bfloat16().requires_grad_()
    weight.requires_grad_()
    results = []
    for choice in ("reference", "triton"):
        with force(choice), torch.autocast(device.type, torch.bfloat16):
            y = projected_linear_attention(projection, weight, bias, heads=2, **RALA)
        results.append([y, *torch.autograd.grad(y.float().sum(), (projection, weight))])
    for ours, eager in zip(*results, strict=True):
        assert ours.dtype == eager.dtype
        scale = eager.float().abs().max().item()
        torch.testing.assert_close(ours, eager, rtol=0.05, atol=0.03 * scale)
