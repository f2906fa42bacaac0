"""Convolutions of images, and those with bias and activation in one more pass."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linsight.kernels import force
from linsight.kernels.conv2d import conv2d

from . import numerics
from .conftest import INTERPRETED, compile_whole
from .numerics import RESULT, ROUNDINGS, distance


def case(batch, inputs, outputs, kernel, size, device, dtype=torch.float32) -> list[Tensor]:
    x = torch.randn(batch, inputs, *size, device=device).to(memory_format=torch.channels_last)
    weight = torch.randn(outputs, inputs, kernel, kernel, device=device)
    bias = 4 * torch.randn(outputs, device=device)
    return [t.to(dtype) for t in (x, weight, bias)]


def assert_as_exact_as_eager(tensors: list[Tensor], **options) -> None:
    """In inference: the error against float64 at most twice that of PyTorch's own operators."""
    with torch.inference_mode():
        exact = conv2d(*(t.double() for t in tensors), **options)
        with force("reference"):
            eager = conv2d(*tensors, **options)
        with force("triton"):
            ours = conv2d(*tensors, **options)
    assert ours.dtype == eager.dtype
    assert ours.is_contiguous(memory_format=torch.channels_last)
    # Under the interpreter bfloat16 is rounded towards zero.
    slack = 2.0 if INTERPRETED and ours.dtype == torch.bfloat16 else 1.0
    floor = ROUNDINGS[ours.dtype] * torch.finfo(ours.dtype).eps
    assert distance(ours, exact) <= slack * RESULT * max(distance(eager, exact), floor)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "gelu", "relu"])
def test_error_against_float64(dtype, activation, device, seed) -> None:
    for inputs in (3, 12):
        tensors = case(2, inputs, 32, 3, (9, 14), device, dtype)
        assert_as_exact_as_eager(tensors, stride=2, padding=1, activation=activation)


@pytest.mark.triton
def test_random_shapes(random_cases, device, seed) -> None:
    draw = random.Random(seed)
    for _ in random_cases:
        size, kernel = (draw.choice((3, 5, 12)), draw.choice((4, 7))), draw.choice((1, 2, 3))
        batch, inputs, outputs = (
            draw.choice((1, 3)),
            draw.choice((1, 3, 5)),
            draw.choice((1, 7, 96)),
        )
        print(size, kernel, batch, inputs, outputs)
        tensors = case(batch, inputs, outputs, kernel, size, device)
        stride, padding = draw.choice((1, 2)), draw.choice((0, 1))
        activation = draw.choice((None, "gelu", "relu"))
        assert_as_exact_as_eager(tensors, stride=stride, padding=padding, activation=activation)


@pytest.mark.triton
def test_large_values_and_zeros(device) -> None:
    x, weight, _ = case(1, 2, 8, 1, (3, 4), device)
    bias = torch.tensor([-20.0, -7.0, -1e-3, 0.0, 0.0, 1e-3, 7.0, 20.0], device=device)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [t.to(dtype) for t in (x * 0, weight, bias)]
        assert_as_exact_as_eager(tensors, activation="gelu")


@pytest.mark.triton
@pytest.mark.parametrize("inputs", [3, 6])
def test_any_strides(inputs, device) -> None:
    x, weight, bias = case(2, inputs, 4, 3, (10, 6), device)
    bias = bias.repeat_interleave(3)[::3]
    expected = F.gelu(F.conv2d(x[:, :, ::2].flip(3), weight, bias, padding=1))
    for image in (x, x.contiguous()):
        with torch.no_grad(), force("triton"):
            found = conv2d(image[:, :, ::2].flip(3), weight, bias, padding=1, activation="gelu")
        torch.testing.assert_close(found, expected)


@pytest.mark.triton
@pytest.mark.parametrize("inputs", [3, 6])
def test_a_maps_gradient_is_pytorchs(inputs, device) -> None:
    tensors = [t.requires_grad_() for t in case(1, inputs, 3, 3, (4, 5), device)]
    with force("triton"):
        found = torch.autograd.grad(conv2d(*tensors, activation="gelu").sum(), tensors)
    wanted = torch.autograd.grad(F.gelu(F.conv2d(*tensors)).sum(), tensors)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (4, 4, 0), (7, 4, 2)])
def test_gradients_of_an_images_layer(kernel, stride, padding, dtype, device, seed) -> None:
    size = (19, 13) if device.type == "cpu" else (224, 192)
    for outputs, biased in ((5, False), (96, True)):
        x, weight, bias = case(3, 3, outputs, kernel, size, device)
        x = x.to(dtype)

        def function(*parameters: Tensor, x: Tensor = x) -> Tensor:
            image = x.to(parameters[0].dtype)
            return conv2d(image, *parameters, stride=stride, padding=padding, activation="gelu")

        slope = torch.randn_like(function(weight.to(dtype)))
        tensors = [weight, bias] if biased else [weight]
        numerics.assert_as_exact_as_eager(function, tensors, dtype, slope)


@pytest.mark.triton
def test_an_image_under_autocast(device) -> None:
    """Half precision's result of a float32 image as it lies, and the parameters' gradients."""
    x, weight, bias = case(2, 3, 32, 3, (9, 14), device)
    results = []
    for choice in ("reference", "triton"):
        parameters = [t.clone().requires_grad_() for t in (weight, bias)]
        with force(choice), torch.autocast(device.type, torch.bfloat16):
            y = conv2d(x, *parameters, stride=2, padding=1)
        results.append([y, *torch.autograd.grad(y.square().sum(), parameters)])
    for eager, ours in zip(*results, strict=True):
        assert ours.dtype == eager.dtype
        assert distance(ours, eager.double()) < 2e-2


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_of_a_maps_layer(dtype, device, seed) -> None:
    """The bias is added, and its gradient summed, by the kernels."""
    size = (7, 5) if device.type == "cpu" else (56, 48)
    for options in ({"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2, "groups": 3}):
        x, weight, bias = case(2, 12, 96, 3, size, device)
        weight = weight[:, : 12 // options.get("groups", 1)]

        def function(*tensors: Tensor, options: dict = options) -> Tensor:
            return conv2d(*tensors, activation="gelu", **options)

        slope = torch.randn_like(function(x, weight, bias))
        # A bias's gradient sums many terms, which cancel.
        numerics.assert_as_exact_as_eager(function, [x, weight, bias], dtype, slope)


@pytest.mark.triton
@pytest.mark.parametrize("frozen", range(3))
def test_frozen_tensors_get_no_gradient(frozen, device, seed) -> None:
    tensors = [t.requires_grad_() for t in case(2, 6, 8, 3, (5, 4), device)]
    tensors[frozen].requires_grad_(False)
    wanted = [t for t in tensors if t.requires_grad]
    found = []
    for choice in ("triton", "reference"):
        with force(choice):
            found.append(torch.autograd.grad(conv2d(*tensors).square().sum(), wanted))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("padding", ["same", "valid", 1, (0, 2)])
@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("choice", ["reference", pytest.param("triton", marks=pytest.mark.triton)])
def test_geometry_is_pytorchs(choice, kernel, padding, device) -> None:
    for inputs in (2, 6):
        x, weight, bias = case(1, inputs, 4, kernel, (6, 7), device)
        for dilation, groups in ((1, 1), (2, 1), (1, 2)):
            options = {"padding": padding, "dilation": dilation, "groups": groups}
            part = weight[:, : inputs // groups]
            with force(choice):
                found = conv2d(x, part, bias, **options)
            torch.testing.assert_close(found, F.conv2d(x, part, bias, **options))
    with pytest.raises(RuntimeError, match="padding='same' is not supported for strided"):
        conv2d(x, weight, bias, stride=2, padding="same")


@pytest.mark.triton
def test_a_map_under_autocast(device, seed) -> None:
    x, weight, bias = case(2, 12, 32, 3, (9, 14), device)
    results = []
    for choice in ("reference", "triton"):
        tensors = [t.clone().requires_grad_() for t in (x, weight, bias)]
        with force(choice), torch.autocast(device.type, torch.bfloat16):
            y = conv2d(*tensors, padding=1)
        results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    for eager, ours in zip(*results, strict=True):
        assert ours.dtype == eager.dtype
        assert distance(ours, eager.double()) < 2e-2


@pytest.mark.triton
def test_every_element_is_written(device, monkeypatch) -> None:
    numerics.poison_memory(monkeypatch)
    for inputs in (3, 6):
        x, weight, bias = case(3, inputs, 24, 3, (7, 9), device)
        parameters = [t.requires_grad_() for t in (weight, bias)]
        with force("triton"):
            y = conv2d(x, *parameters, padding=1)
            gradients = torch.autograd.grad(y.sum(), parameters)
        assert all(t.isfinite().all() for t in (y, *gradients))


@pytest.mark.triton
def test_shapes_that_disagree_are_pytorchs_to_refuse(device) -> None:
    x, weight, bias = case(1, 3, 8, 3, (4, 4), device)
    with force("triton"):
        for tensors in (
            (x, weight[:, :2], bias),
            (x, weight, bias[:7]),
            (x, weight.double(), bias),
        ):
            with pytest.raises(RuntimeError):
                conv2d(*tensors)
        with pytest.raises(RuntimeError, match="Kernel size"):
            conv2d(x[:, :, :2], weight, bias)


@pytest.mark.triton
def test_compiles_without_a_graph_break(device) -> None:
    _, weight, bias = case(1, 3, 8, 3, (4, 4), device)
    whole = compile_whole(conv2d)
    for size in ((4, 6), (7, 5), (9, 9)):
        x = case(1, 3, 8, 3, size, device)[0]
        with torch.no_grad(), force("triton"):
            options = {"stride": 2, "padding": 1, "activation": "gelu"}
            torch.testing.assert_close(
                whole(x, weight, bias, **options), conv2d(x, weight, bias, **options)
            )


def test_another_activation_is_refused(device) -> None:
    with pytest.raises(ValueError, match="activation is 'silu', expected None, 'gelu'"):
        conv2d(*case(1, 1, 1, 1, (2, 2), device), activation="silu")
