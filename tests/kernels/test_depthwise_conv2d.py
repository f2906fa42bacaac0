"""Depthwise convolution: the reference against PyTorch's pieces, Triton against both."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linsight.kernels import force
from linsight.kernels.depthwise_conv2d import depthwise_conv2d

from .conftest import compile_whole
from .numerics import assert_as_exact_as_eager, leaves


def direct(x: Tensor, weight: Tensor, bias: Tensor, stride: int, dilation: int = 1) -> Tensor:
    """Pixel by pixel, tap by tap."""
    high, wide = weight.shape[2:]
    batch, height, width, _ = x.shape
    rows, columns = -(-height // stride), -(-width // stride)
    y = bias.expand(batch, rows, columns, -1).clone()
    for r in range(rows):
        for c in range(columns):
            for i in range(high):
                for j in range(wide):
                    row = r * stride + (i - high // 2) * dilation
                    column = c * stride + (j - wide // 2) * dilation
                    if 0 <= row < height and 0 <= column < width:
                        y[:, r, c] += x[:, row, column] * weight[:, 0, i, j]
    return y


@pytest.mark.parametrize("window", [(1, 1), (3, 3), (5, 5), (1, 11), (7, 1), (3, 5)])
@pytest.mark.parametrize("stride", [1, 2])
def test_reference_is_the_sum(window: tuple[int, int], stride: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    weight = torch.randn(3, 1, *window, dtype=torch.float64)
    bias = torch.randn(3, dtype=torch.float64)
    y = depthwise_conv2d(x, weight, bias, stride=stride)
    torch.testing.assert_close(y, direct(x, weight, bias, stride))
    for name in ("gelu", "relu"):
        activate = getattr(F, name)
        of_activation = depthwise_conv2d(x, weight, bias, stride=stride, activation=name)
        torch.testing.assert_close(of_activation, direct(activate(x), weight, bias, stride))
        if stride == 1:
            y = depthwise_conv2d(x, weight, bias, activation=name, residual=True)
            torch.testing.assert_close(y, of_activation + activate(x))


@pytest.mark.parametrize("window", [(5, 5), (7, 1), (1, 5)])
@pytest.mark.parametrize("dilation", [2, 3, 5])
def test_reference_skips_pixels(dilation: int, window: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 4, 3, dtype=torch.float64)
    weight = torch.randn(3, 1, *window, dtype=torch.float64)
    bias = torch.randn(3, dtype=torch.float64)
    y = depthwise_conv2d(x, weight, bias, dilation=dilation)
    torch.testing.assert_close(y, direct(x, weight, bias, 1, dilation))


@pytest.mark.parametrize("window", [(3, 3), (5, 1), (1, 5)])
@pytest.mark.parametrize(("stride", "residual"), [(1, True), (2, False)])
def test_reference_gradient(stride: int, residual: bool, window: tuple[int, int]) -> None:
    torch.manual_seed(0)
    shapes = ((1, 4, 5, 2), (2, 1, *window), (2,))
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return depthwise_conv2d(
            x, weight, bias, stride=stride, activation="gelu", residual=residual
        )

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


def test_errors_name_the_argument() -> None:
    x, weight = torch.randn(1, 4, 4, 6), torch.randn(6, 1, 3, 3)
    with pytest.raises(ValueError, match="x has shape"):
        depthwise_conv2d(x[0], weight)
    for wrong in (weight[:3], weight[:, 0]):
        with pytest.raises(ValueError, match=r"weight has shape .* expected \(6, 1, h, w\)"):
            depthwise_conv2d(x, wrong)
    with pytest.raises(ValueError, match=r"or \(1, 6, h, w\) for a window of each image"):
        depthwise_conv2d(x, torch.randn(2, 6, 3, 3))
    for even in (weight[:, :, 1:], weight[..., 1:]):
        with pytest.raises(ValueError, match="expected odd h and w"):
            depthwise_conv2d(x, even)
    for options in ({"stride": 2}, {"dilation": 2}, {"bias": torch.randn(6)}):
        with pytest.raises(ValueError, match="which needs stride and dilation 1 and no bias"):
            depthwise_conv2d(x.expand(2, -1, -1, -1), torch.randn(2, 6, 3, 3), **options)
    with pytest.raises(ValueError, match="stride is 3"):
        depthwise_conv2d(x, weight, stride=3)
    for options in ({"dilation": 0}, {"dilation": 2, "stride": 2}):
        with pytest.raises(ValueError, match=r"dilation is \d at stride \d, expected 1"):
            depthwise_conv2d(x, weight, **options)
    for name in ("activation", "result_activation"):
        with pytest.raises(ValueError, match=f"^{name} is 'silu'"):
            depthwise_conv2d(x, weight, **{name: "silu"})
    with pytest.raises(ValueError, match="residual needs stride 1"):
        depthwise_conv2d(x, weight, stride=2, residual=True)
    with pytest.raises(ValueError, match=r"weight is torch\.float64, but x is torch\.float32"):
        depthwise_conv2d(x, weight.double())


def case(
    shape: tuple[int, int, int, int],
    kernel: int | tuple[int, int],
    bias: bool,
    device: torch.device,
) -> tuple[list[Tensor | None], Tensor]:
    """A map sliced out of a packed projection, its parameters, and a gradient to send back.

    A kernel is the side of a square, or rows and columns.
    """
    *outer, channels = shape
    window = (kernel, kernel) if isinstance(kernel, int) else kernel
    x = torch.randn(*outer, 3, channels, device=device)[..., 1, :]
    weight = torch.randn(channels, 1, *window, device=device) / math.prod(window) ** 0.5
    return [x, weight, torch.randn(channels, device=device) if bias else None], x


@pytest.mark.triton
@pytest.mark.parametrize(
    ("kernel", "stride", "activation", "residual", "dtype"),
    [
        (3, 1, "gelu", True, torch.float32),
        (3, 1, "gelu", True, torch.float16),
        (3, 1, "gelu", True, torch.bfloat16),
        (3, 1, "relu", True, torch.float32),
        (3, 2, "relu", False, torch.bfloat16),
        (5, 1, None, False, torch.float32),
        (7, 1, None, False, torch.float32),
        (9, 1, None, False, torch.float32),
        (3, 2, "gelu", False, torch.float32),
        (5, 2, None, False, torch.float16),
        ((1, 11), 1, None, False, torch.float32),
        ((11, 1), 1, None, False, torch.bfloat16),
        ((11, 1), 1, "gelu", True, torch.float16),
        ((7, 1), 2, "relu", False, torch.float32),
    ],
)
def test_error_against_float64(kernel, stride, activation, residual, dtype, device, seed) -> None:
    small = (1, 3, 5, 8) if kernel in (7, 9) else (1, 5, 9, 40)
    shape = small if device.type == "cpu" else (8, 56, 56, 224)
    tensors, _ = case(shape, kernel, True, device)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return depthwise_conv2d(
            x, weight, bias, stride=stride, activation=activation, residual=residual
        )

    slope = torch.randn(function(*tensors).shape, device=device)
    assert_as_exact_as_eager(function, tensors, dtype, slope)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("kernel", "dilation", "activation", "dtype"),
    [
        (7, 3, None, torch.float32),
        (3, 2, "gelu", torch.float16),
        (5, 3, "relu", torch.bfloat16),
        (3, 5, None, torch.float32),
        ((5, 1), 2, None, torch.float32),
        ((1, 11), 3, "relu", torch.bfloat16),
    ],
)
def test_dilation(kernel, dilation, activation, dtype, device, seed) -> None:
    """Also where phases differ in size, and where some of them have no rows or no columns."""
    shapes = [(2, 7, 10, 24), (1, 2, 13, 8), (2, 8, 1, 8)]
    for shape in shapes if device.type == "cpu" else [*shapes, (8, 56, 55, 96)]:
        tensors, _ = case(shape, kernel, True, device)

        def function(x: Tensor, weight: Tensor, bias: Tensor, residual=dtype.itemsize == 2):
            return depthwise_conv2d(
                x, weight, bias, dilation=dilation, activation=activation, residual=residual
            )

        assert_as_exact_as_eager(function, tensors, dtype, torch.randn(shape, device=device))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"result_activation": "gelu"},
        {"result_activation": "relu", "stride": 2},
        {"result_activation": "gelu", "activation": "relu", "residual": True, "dilation": 2},
    ],
)
def test_the_result_is_activated_where_it_is_stored(options, dtype, device, seed) -> None:
    """Without a gradient in one kernel, with one by PyTorch, both as exactly."""
    shape = (2, 7, 9, 40) if device.type == "cpu" else (8, 56, 56, 96)
    (x, weight, bias), _ = case(shape, 3, True, device)
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    with torch.no_grad(), force("triton"):
        alone = depthwise_conv2d(x, weight, bias, **options)
    with force("triton"):
        together = depthwise_conv2d(x, weight.requires_grad_(), bias, **options)
    (gradient,) = torch.autograd.grad(together.sum(), weight)
    assert gradient.isfinite().all()
    exact = (t.detach().double() for t in (x, weight, bias))
    with force("reference"):
        wanted = depthwise_conv2d(*exact, **{**options, "result_activation": None})
    wanted = getattr(F, options["result_activation"])(wanted)
    for y in (alone, together.detach()):
        assert y.dtype == dtype
        error = (y.double() - wanted).abs().max() / wanted.abs().max()
        assert error < {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]


@pytest.mark.triton
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("kernel", "activation", "dtype"),
    [
        (3, None, torch.float32),
        (3, "gelu", torch.bfloat16),
        (5, "relu", torch.float16),
    ],
)
def test_a_branch_is_added_where_it_is_loaded(kernel, activation, dtype, scaled, device, seed):
    """Without a gradient in one kernel, with one in two, of which the sum is the same."""
    shape = (2, 5, 9, 40) if device.type == "cpu" else (8, 56, 56, 96)
    (x, weight, bias), _ = case(shape, kernel, True, device)
    branch = torch.randn(2, *shape, device=device)[1]
    scale = torch.rand(shape[-1], device=device) if scaled else None
    x, weight, bias, branch, scale = (
        None if t is None else t.to(dtype) for t in (x, weight, bias, branch, scale)
    )

    def function(branch: Tensor) -> Tensor:
        return depthwise_conv2d(
            x, weight, bias, activation=activation, residual=True, branch=branch, scale=scale
        )

    with torch.no_grad():
        alone = function(branch)
    together = function(branch.requires_grad_())
    assert torch.equal(alone, together)
    with torch.no_grad():
        exact = x.double() + (1 if scale is None else scale.double()) * branch.double()
        exact = exact.to(dtype).double()
        exact = exact if activation is None else getattr(torch.nn.functional, activation)(exact)
        maps = exact.permute(0, 3, 1, 2)
        padding, groups = kernel // 2, shape[-1]
        wanted = exact + torch.nn.functional.conv2d(
            maps, weight.double(), bias.double(), padding=padding, groups=groups
        ).permute(0, 2, 3, 1)
    error = (alone.double() - wanted).abs().max() / wanted.abs().max()
    assert error < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    (gradient,) = torch.autograd.grad(together.sum(), branch)
    assert gradient.shape == branch.shape


@pytest.mark.triton
def test_random_shapes(random_cases, device, seed) -> None:
    draw = random.Random(seed)
    for _ in random_cases:
        sides = ((1, 2), (1, 2, 7), (1, 7, 11), (1, 8, 16, 24, 40))
        shape = tuple(draw.choice(sizes) for sizes in sides)
        kernel, stride = draw.choice((3, 5, (1, 11), (11, 1), (3, 1))), draw.choice((1, 2))
        dilation = draw.choice((1, 2, 3)) if stride == 1 else 1
        print(shape, kernel, stride, dilation)
        tensors, _ = case(shape, kernel, False, device)

        def function(
            x: Tensor, weight: Tensor, bias: None, stride: int = stride, dilation: int = dilation
        ) -> Tensor:
            return depthwise_conv2d(
                x, weight, bias, stride=stride, dilation=dilation, residual=stride == 1
            )

        slope = torch.randn(function(*tensors).shape, device=device)
        assert_as_exact_as_eager(function, tensors, torch.float32, slope)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("kernel", "dtype", "residual"),
    [
        (3, torch.float32, False),
        (3, torch.bfloat16, False),
        (5, torch.float16, True),
        ((9, 1), torch.float32, True),
    ],
)
def test_a_window_for_each_image(kernel, dtype, residual, device, seed) -> None:
    shape = (3, 5, 9, 40) if device.type == "cpu" else (8, 56, 56, 96)
    (x, weight, _), _ = case(shape, kernel, False, device)
    windows = torch.stack([weight, *torch.randn(shape[0] - 1, *weight.shape, device=device)])
    windows = windows.squeeze(2)

    def function(x: Tensor, windows: Tensor) -> Tensor:
        return depthwise_conv2d(x, windows, residual=residual)

    with force("reference"):
        alone = [
            depthwise_conv2d(x[i, None], windows[i, :, None], residual=residual) for i in range(2)
        ]
        torch.testing.assert_close(function(x, windows)[:2], torch.cat(alone))
    assert_as_exact_as_eager(function, [x, windows], dtype, torch.randn_like(x))


@pytest.mark.triton
def test_vectors_with_strides(device, seed) -> None:
    """A bias and a layer scale that are columns of a matrix."""
    (x, weight, bias), _ = case((2, 4, 5, 12), 3, True, device)
    bias, scale = (v.repeat_interleave(3)[::3] for v in (bias, torch.randn(12, device=device)))
    found = []
    for choice in ("triton", "reference"):
        with force(choice):
            found.append(depthwise_conv2d(x, weight, bias, branch=x + 1, scale=scale))
    torch.testing.assert_close(*found)


@pytest.mark.triton
@pytest.mark.parametrize("shape", [(0, 4, 5, 12), (2, 0, 5, 12), (2, 4, 0, 12)])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"dilation": 2}, {"own": True}], ids=str)
def test_a_map_without_pixels(shape, options, device) -> None:
    """No images, rows or columns: an empty result, and gradients of zero."""
    own, stride = options.get("own", False), options.get("stride", 1)
    options = {name: value for name, value in options.items() if name != "own"}
    window = torch.randn(shape[0] if own else 12, 12 if own else 1, 3, 3)
    tensors = [torch.randn(shape), window, *([] if own else [torch.randn(12)])]
    tensors = [x.to(device).requires_grad_() for x in tensors]
    with force("triton"):
        y = depthwise_conv2d(*tensors, **options)
        gradients = torch.autograd.grad(y.sum(), tensors)
        fused = depthwise_conv2d(
            *(x.detach() for x in tensors), **options, result_activation="gelu"
        )
    assert y.shape == fused.shape == (shape[0], *(-(-n // stride) for n in shape[1:3]), 12)
    assert [g.shape for g in gradients] == [x.shape for x in tensors]
    assert not any(g.any() for g in gradients)


@pytest.mark.triton
def test_every_element_is_written(device, monkeypatch) -> None:
    allocate, empty = torch.Tensor.new_empty, torch.empty
    nan = float("nan")
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda x, *size, **kw: allocate(x, *size, **kw).fill_(nan)
    )
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: empty(*size, **kw).fill_(nan))
    for kernel, options in (
        *((3, {"stride": 1}), (3, {"stride": 2}), (3, {"dilation": 3}), (3, {"dilation": 8})),
        *(((1, 11), {}), ((11, 1), {}), ((3, 1), {"stride": 2}), ((5, 1), {"dilation": 3})),
    ):
        tensors = leaves(case((2, 5, 6, 40), kernel, True, device)[0], torch.float32)
        with force("triton"):
            y = depthwise_conv2d(*tensors, **options, activation="gelu")
            gradients = torch.autograd.grad(y.sum(), tensors)
        assert all(x.isfinite().all() for x in (y, *gradients))
    windows = torch.randn(2, 40, 3, 3, device=device, requires_grad=True)
    with force("triton"):
        y = depthwise_conv2d(tensors[0], windows)
        gradients = torch.autograd.grad(y.sum(), (tensors[0], windows))
    assert all(x.isfinite().all() for x in (y, *gradients))


@pytest.mark.triton
def test_registration(device) -> None:
    (x, weight, bias), _ = case((1, 2, 3, 8), 3, True, device)
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    x, *parameters = tensors
    for options in ((1, 1, "gelu", True), (2, 1, None, False), (1, 2, None, False)):
        arguments = (x, *parameters, *options, torch.float32)
        torch.library.opcheck(torch.ops.linsight.depthwise_conv2d.default, arguments)
    column = torch.randn(8, 1, 5, 1, device=device, requires_grad=True)
    arguments = (x, column, parameters[1], 1, 1, None, False, torch.float32)
    torch.library.opcheck(torch.ops.linsight.depthwise_conv2d.default, arguments)
    windows = torch.randn(2, 8, 3, 3, device=device, requires_grad=True)
    x = torch.randn(2, 2, 3, 8, device=device, requires_grad=True)
    arguments = (x, windows, None, 1, 1, None, False, torch.float32)
    torch.library.opcheck(torch.ops.linsight.depthwise_conv2d.default, arguments)
    x, weight, bias = (t.detach() for t in tensors)
    arguments = (x, None, None, weight, bias, 1, 2, None, False, "gelu", torch.float32)
    torch.library.opcheck(torch.ops.linsight.fused_depthwise_conv2d.default, arguments)


@pytest.mark.triton
@pytest.mark.slow
def test_compiles_without_a_graph_break(device) -> None:
    weight = torch.randn(8, 1, 3, 3, device=device, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return depthwise_conv2d(x, weight, activation="gelu", residual=True) + 1

    whole = compile_whole(function)
    for size in (2, 3, 5):
        x = torch.randn(1, size, size + 1, 8, device=device)
        with force("triton"), torch.autocast(device.type, torch.bfloat16):
            y, z = function(x), whole(x)
            assert y.dtype == z.dtype == torch.float32  # float32 of the residual, as x + y is
            torch.testing.assert_close(z, y)
            gradients = [torch.autograd.grad(result.sum(), weight)[0] for result in (y, z)]
            torch.testing.assert_close(*gradients)


@pytest.mark.triton
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_as_pytorch_would_do(dtype, residual, device) -> None:
    (x, weight, bias), _ = case((1, 4, 5, 8), 3, True, device)
    x, weight = x.to(dtype).requires_grad_(), weight.requires_grad_()
    results = []
    for choice in ("reference", "triton"):
        with force(choice), torch.autocast(device.type, torch.bfloat16):
            y = depthwise_conv2d(x, weight, bias, residual=residual)
        results.append([y, *torch.autograd.grad(y.float().sum(), (x, weight))])
    for ours, eager in zip(*results, strict=True):
        assert ours.dtype == eager.dtype
        torch.testing.assert_close(ours, eager, rtol=0.03, atol=0.1)
