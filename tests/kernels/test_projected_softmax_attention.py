"""The gated softmax core of a packed projection against the parts it is made of."""

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linsight.kernels import force
from linsight.kernels.depthwise_conv2d import depthwise_conv2d
from linsight.kernels.projected_softmax_attention import projected_softmax_attention
from linsight.kernels.rotary import apply_rotary, rotary_tables

from .numerics import assert_as_exact_as_eager, assert_empty, poison_memory
from .test_projected_linear_attention import assert_compiles, case


def operator(
    size: tuple[int, int] | None, width: int, heads: int, **options: bool
) -> Callable[..., Tensor]:
    """The operator, with rotary tables of a map of `size` or without any."""

    def function(projection: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        place = projection.dtype, projection.device
        rotary = rotary_tables(size, width, *place) if size else None
        return projected_softmax_attention(
            projection, weight, bias, heads=heads, rotary=rotary, **options
        )

    return function


@pytest.mark.parametrize("rotated", [True, False])
def test_reference_is_the_composition(rotated: bool) -> None:
    torch.manual_seed(0)
    projection, weight, bias = case((4, 6), 16, torch.device("cpu"))
    q, k, v, gate = (x.reshape(2, 24, 2, 8).transpose(1, 2) for x in projection.chunk(4, -1))
    local = depthwise_conv2d(projection[..., 32:48], weight, bias)
    if rotated:
        rotary = rotary_tables((4, 6), 8, projection.dtype, projection.device)
        q, k = (apply_rotary(x.transpose(1, 2), rotary).transpose(1, 2) for x in (q, k))
    y = F.scaled_dot_product_attention(q, k, v)
    expected = (y + local.reshape(2, 24, 2, 8).transpose(1, 2)) * gate
    y = operator((4, 6) if rotated else None, 8, 2)(projection, weight, bias)
    torch.testing.assert_close(y, expected.transpose(1, 2).reshape(2, 4, 6, 16))


def test_reference_gradient() -> None:
    torch.manual_seed(0)
    tensors = [x.double().requires_grad_() for x in case((2, 3), 8, torch.device("cpu"), 1, 3)]
    assert torch.autograd.gradcheck(operator((2, 3), 4, 2), tensors)


def test_errors_name_the_argument() -> None:
    projection, weight, bias = case((4, 6), 16, torch.device("cpu"))
    with pytest.raises(ValueError, match="multiple of heads = 3"):
        projected_softmax_attention(projection, weight, bias, heads=3)
    with pytest.raises(ValueError, match=r"weight has shape .* expected \(16, 1, k, k\)"):
        projected_softmax_attention(projection, weight[:8], bias, heads=2)
    with pytest.raises(ValueError, match=r"a map of 3 x 6 tokens, but projection has 24"):
        operator((3, 6), 8, 2)(projection, weight, bias)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_against_float64(dtype, device, seed) -> None:
    small = device.type == "cpu"
    size, channels, batch, kernel = ((3, 7), 32, 1, 3) if small else ((14, 14), 320, 4, 5)
    tensors = case(size, channels, device, batch, kernel)
    slope = torch.randn(batch, *size, channels, device=device)
    heads = 2 if small else 5
    assert_as_exact_as_eager(operator(size, channels // heads, heads), tensors, dtype, slope)


@pytest.mark.triton
def test_random_shapes(random_cases, device, seed) -> None:
    draw = random.Random(seed)
    sides = (1, 3, 5) if device.type == "cpu" else (1, 7, 13, 28)
    for _ in random_cases:
        size, batch = (draw.choice(sides), draw.choice(sides)), draw.choice((1, 2))
        heads, width, kernel = draw.choice((1, 3)), draw.choice((8, 24, 32)), draw.choice((3, 5))
        rotated, biased = draw.random() < 0.7, draw.random() < 0.7
        print(size, batch, heads, width, kernel, rotated, biased)
        tensors = case(size, heads * width, device, batch, kernel)[: 2 + biased]
        slope = torch.randn(batch, *size, heads * width, device=device)
        function = operator(size if rotated else None, width, heads)
        assert_as_exact_as_eager(function, tensors, torch.float32, slope)


@pytest.mark.triton
def test_a_bias_with_strides(device, seed) -> None:
    """A bias that is a column of a matrix."""
    *tensors, bias = case((3, 4), 32, device, 1, 3)
    tensors.append(bias.repeat_interleave(3)[::3])
    slope = torch.randn(1, 3, 4, 32, device=device)
    assert_as_exact_as_eager(operator((3, 4), 16, 2), tensors, torch.float32, slope)


@pytest.mark.triton
def test_no_images(device) -> None:
    """An empty result, and gradients of zero."""
    tensors = case((3, 4), 32, device, 0, 3)
    assert_empty(operator((3, 4), 16, 2), tensors, (0, 3, 4, 32))


def outcome(projection: Tensor, weight: Tensor, bias: Tensor, overwrite: bool) -> list[Tensor]:
    """Result and gradients of the operator on a map of 3 x 5 in two heads of 8."""
    leaves = [x.clone().requires_grad_() for x in (projection, weight, bias)]
    function = operator((3, 5), 8, 2, overwrite=overwrite)
    with force("triton"):
        # As from a linear layer: a view, made inside an autograd function.
        identity = torch.eye(projection.shape[-1], device=projection.device)
        y = function(F.linear(leaves[0], identity), *leaves[1:])
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]


@pytest.mark.triton
def test_overwriting_changes_no_result(device, seed) -> None:
    tensors = case((3, 5), 16, device, 2, 3)
    for ours, eager in zip(outcome(*tensors, True), outcome(*tensors, False), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.triton
def test_only_overwriting_changes_the_projection(device, seed) -> None:
    projection, weight, bias = case((3, 5), 16, device, 2, 3)
    with force("triton"), torch.inference_mode():
        before = projection.clone()
        kept = operator((3, 5), 8, 2)(projection, weight, bias)
        assert torch.equal(projection, before)
        assert torch.equal(operator((3, 5), 8, 2, overwrite=True)(projection, weight, bias), kept)
        assert not torch.equal(projection[..., :32], before[..., :32])
        assert torch.equal(projection[..., 32:], before[..., 32:])


@pytest.mark.triton
def test_who_keeps_an_overwritten_projection_is_told(device) -> None:
    projection, weight, bias = case((3, 5), 16, device, 2, 3)
    projection = projection.requires_grad_() * 1
    square = projection.square()  # its gradient needs the projection
    with force("triton"):
        y = operator((3, 5), 8, 2, overwrite=True)(projection, weight, bias)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y.sum() + square.sum()).backward()


@pytest.mark.triton
def test_every_element_is_written(device, monkeypatch, seed) -> None:
    poison_memory(monkeypatch)
    for result in outcome(*case((3, 5), 16, device, 2, 3), True):
        assert result.isfinite().all()


@pytest.mark.triton
def test_compiles_without_a_graph_break(device) -> None:
    _, weight, bias = (x.requires_grad_() for x in case((1, 1), 32, device, 1, 3))

    def function(x: Tensor) -> Tensor:
        return projected_softmax_attention(x.cos(), weight, bias, heads=2, overwrite=True) * 2

    assert_compiles(function, weight, bias)
