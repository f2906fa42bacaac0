"""Window attention: the reference token by token, Triton against it."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linsight.kernels import force
from linsight.kernels.depthwise_conv2d import depthwise_conv2d
from linsight.kernels.window_attention import window_attention

from .conftest import INTERPRETED, compile_whole
from .numerics import assert_as_exact_as_eager, distance, leaves, poison_memory

SWIN = {"windows": [(3, 3)], "shift": (1, 1)}
CASES = {
    "plain": {"windows": [(3, 4)]},
    "shifted": SWIN,
    "after": SWIN | {"padding": "end_after_shift"},
    "uneven": {"windows": [(2, 5)], "shift": (0, 3)},
    "cross": {"windows": [(6, 2), (2, 7)], "padding": "centre"},
}


# Sides of windows that are one tile, and of such as are streamed.
SMALL, LARGE = (4, 5) if INTERPRETED else (7, 12)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter, tiles so small that a small window is streamed."""
    if INTERPRETED:
        from linsight.kernels.window_attention import operator

        monkeypatch.setattr(operator, "largest_tile", lambda *_: 16)


def case(
    shape: tuple[int, int, int],
    heads: int,
    head_dim: int,
    options: dict,
    device: torch.device,
    table: bool = True,
    fill: bool = True,
    local: bool = True,
    kernel: int = 3,
) -> list[Tensor | None]:
    """A packed projection, sliced out of wider rows; table, fill, weight and bias."""
    channels = heads * head_dim
    projection = torch.randn(*shape, 3 * channels + 16, device=device)[..., : 3 * channels]
    rows, columns = (2 * max(w[i] for w in options["windows"]) - 1 for i in (0, 1))
    several = len(options["windows"]) > 1
    return [
        projection,
        torch.randn(rows + 2, columns, heads, device=device) if table and not several else None,
        torch.randn(3 * channels, device=device) if fill else None,
        torch.randn(channels, 1, kernel, kernel, device=device) / kernel if local else None,
        torch.randn(channels, device=device) if local else None,
    ]


def attention(heads: int, options: dict):
    def function(projection, table, fill, weight, bias) -> Tensor:
        return window_attention(
            projection, heads=heads, table=table, fill=fill, weight=weight, bias=bias, **options
        )

    return function


def direct(tensors: list[Tensor], heads: int, options: dict) -> Tensor:
    """Query by query: the keys are the tokens that the definition puts in its window."""
    projection, table, fill, weight, bias = tensors
    batch, height, width, packed = projection.shape
    channels = packed // 3
    windows, padding = options["windows"], options.get("padding", "end")
    (shift_y, shift_x), width_d = options.get("shift", (0, 0)), channels // heads
    share = heads // len(windows)
    y = torch.zeros(batch, height, width, channels, dtype=projection.dtype)
    for head in range(heads):
        wh, ww = windows[head // share]
        rows, columns = -(-height // wh) * wh, -(-width // ww) * ww
        top, left = (
            ((rows - height) // 2, (columns - width) // 2) if padding == "centre" else (0, 0)
        )
        own = slice(head * width_d, (head + 1) * width_d)
        blocks = [slice(i * channels + own.start, i * channels + own.stop) for i in range(3)]

        def source(i, j, rows=rows, columns=columns, top=top, left=left):
            """Of a place in the shifted, padded map: the pixel, or none where it is padding."""
            if padding == "end_after_shift":
                inside = i < height and j < width
                return ((i + shift_y) % height, (j + shift_x) % width) if inside else None
            i, j = (i + shift_y) % rows - top, (j + shift_x) % columns - left
            return (i, j) if 0 <= i < height and 0 <= j < width else None

        def row(b, place, block, blocks=blocks):
            return projection[b][place][blocks[block]] if place else fill[blocks[block]]

        for b in range(batch):
            for i in range(rows):
                for j in range(columns):
                    if (place := source(i, j)) is None:
                        continue
                    query = row(b, place, 0)
                    base = i // wh * wh, j // ww * ww
                    scores, values, total = [], [], bias[own].clone()
                    for u in range(base[0], base[0] + wh):
                        for v in range(base[1], base[1] + ww):
                            other = source(u, v)
                            score = query @ row(b, other, 1) * width_d**-0.5
                            if table is not None:
                                dy, dx = i - u + table.shape[0] // 2, j - v + table.shape[1] // 2
                                score = score + table[dy, dx, head]
                            apart = (i >= rows - shift_y) != (u >= rows - shift_y)
                            apart |= (j >= columns - shift_x) != (v >= columns - shift_x)
                            scores.append(score - 100 * apart)
                            values.append(row(b, other, 2))
                            dy, dx = u - i + 1, v - j + 1
                            if 0 <= dy < 3 and 0 <= dx < 3:
                                total = total + values[-1] * weight[own, 0, dy, dx]
                    weights = torch.stack(scores).softmax(0)
                    y[b][place][own] = weights @ torch.stack(values) + total
    return y


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(1, 6, 8), (2, 5, 7)])
def test_reference_is_the_definition(name: str, shape: tuple) -> None:
    torch.manual_seed(0)
    options = CASES[name]
    tensors = case(shape, 2, 2, options, torch.device("cpu"))
    tensors = [x if x is None else x.double() for x in tensors]
    y = attention(2, options)(*tensors)
    torch.testing.assert_close(y, direct(tensors, 2, options))


@pytest.mark.parametrize("name", ["after", "uneven", "cross"])
def test_reference_gradient(name: str) -> None:
    torch.manual_seed(0)
    tensors = case((1, 4, 5), 2, 2, CASES[name], torch.device("cpu"))
    tensors = [x if x is None else x.double().requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(attention(2, CASES[name]), tensors, fast_mode=True)


def test_one_window_is_attention_over_the_map() -> None:
    """Where one window is the map, and the local branch its depthwise convolution."""
    torch.manual_seed(0)
    options = {"windows": [(5, 4)]}
    projection, _, _, weight, bias = case((2, 5, 4), 2, 8, options, torch.device("cpu"))
    y = window_attention(projection, heads=2, weight=weight, bias=bias, **options)
    parts = projection.flatten(1, 2).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    whole = F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(y.shape)
    local = depthwise_conv2d(projection[..., 32:].contiguous(), weight, bias)
    torch.testing.assert_close(y, whole + local)


def test_errors_name_the_argument() -> None:
    x = torch.randn(1, 4, 4, 24)
    for error, options in {
        "projection has shape": {"heads": 3, "windows": [(2, 2)]},
        "heads is 1, expected a multiple of the 2": {"heads": 1, "windows": [(2, 2), (2, 2)]},
        "windows are": {"heads": 2, "windows": [(0, 2)]},
        "padding is 'top'": {"heads": 2, "windows": [(2, 2)], "padding": "top"},
        "shift is": {"heads": 2, "windows": [(2, 2)], "shift": (2, 0)},
        "shift and table need one": {"heads": 2, "windows": [(2, 2), (4, 1)], "shift": (1, 0)},
        "table has shape": {"heads": 2, "windows": [(2, 2)], "table": x[0, :3, :1]},
        "fill has shape": {"heads": 2, "windows": [(2, 2)], "fill": x[0, 0, 0, :8]},
        "weight has shape": {"heads": 2, "windows": [(2, 2)], "weight": x[:, :, :3, :3]},
    }.items():
        with pytest.raises(ValueError, match=error):
            window_attention(x, **options)


# Size of the map, width of a head, options, and what is given.
GEOMETRIES = {
    "swin": ((SMALL + 1, SMALL + 3), 24, {"windows": [(SMALL, SMALL)], "shift": (2, 2)}, {}),
    "whole": (
        (2 * SMALL, 2 * SMALL),
        32,
        {"windows": [(SMALL, SMALL)], "shift": (2, 2)},
        {"fill": False, "local": False},
    ),
    "streamed": (
        (LARGE + 1, LARGE),
        16,
        {"windows": [(LARGE, LARGE)], "shift": (2, 0), "padding": "end_after_shift"},
        {"local": False},
    ),
    "cross": ((8, 7), 32, {"windows": [(8, 2), (2, 7)], "padding": "centre"}, {"fill": False}),
    "streamed_cross": (
        (LARGE, LARGE + 1),
        16,
        {"windows": [(LARGE, LARGE - 1), (LARGE - 1, LARGE + 1)], "padding": "centre"},
        {},
    ),
}


@pytest.mark.triton
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            name,
            dtype,
            marks=[] if dtype == torch.float32 or name == "swin" else pytest.mark.slow,
        )
        for name in GEOMETRIES
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ],
)
def test_error_against_float64(name, dtype, device, seed) -> None:
    size, head_dim, options, given = GEOMETRIES[name]
    shape = (1 if INTERPRETED else 32, *size)
    tensors = case(shape, 2, head_dim, options, device, **given)
    slope = torch.randn(*shape, 2 * head_dim, device=device)
    assert_as_exact_as_eager(attention(2, options), tensors, dtype, slope)


@pytest.mark.triton
def test_a_window_full_of_padding(device, seed) -> None:
    """Where most of a long sum is one term again and again, roundings add up."""
    side = LARGE if INTERPRETED else 31
    options = {"windows": [(side, side)], "padding": "end"}
    tensors = case((1, 1, side), 2, 64, options, device, table=False, local=False)
    slope = torch.randn(1, 1, side, 128, device=device)
    assert_as_exact_as_eager(attention(2, options), tensors, torch.float32, slope)


@pytest.mark.triton
def test_map_smaller_than_its_shift(device) -> None:
    options = {"windows": [(5, 4)], "shift": (3, 2), "padding": "end_after_shift"}
    tensors = case((1, 2, 1), 2, 16, options, device)
    slope = torch.randn(1, 2, 1, 32, device=device)
    assert_as_exact_as_eager(attention(2, options), tensors, torch.float32, slope)


@pytest.mark.triton
def test_random_shapes(random_cases, device, seed) -> None:
    draw = random.Random(seed)
    large = device.type == "cuda"
    for _ in random_cases:
        height, width, side = (draw.choice((1, 2, 3, 5, 7, 14, 31)[: 7 if large else 3 + i])
                               for i in (0, 1, 0))  # fmt: skip
        shape = (draw.choice((1, 3)), height, width)
        if draw.random() < 0.5:
            options = {"windows": [(side, max(1, side - 1))], "shift": (side // 2, 0)}
        else:
            options = {"windows": [(height, side), (side, width)]}
        several = len(options["windows"]) > 1
        options["padding"] = draw.choice(("end", "end_after_shift", "centre"))
        given = {name: draw.random() < 0.5 for name in ("table", "fill", "local")}
        kernel = draw.choice((3, 5))
        head_dim = draw.choice((4, 24, 32) + ((48, 64) if large else ()))
        print(shape, head_dim, options, given, kernel, several)
        tensors = case(shape, 2, head_dim, options, device, kernel=kernel, **given)
        slope = torch.randn(*shape, 2 * head_dim, device=device)
        assert_as_exact_as_eager(attention(2, options), tensors, torch.float32, slope)


@pytest.mark.triton
@pytest.mark.parametrize("side", [SMALL, LARGE])
def test_large_magnitudes_and_zeros(side, device, seed) -> None:
    options = {"windows": [(side, side)], "shift": (2, 2)}
    shape = (1, 3, 5) if INTERPRETED else (1, 4, 9)
    tensors = case(shape, 2, 16, options, device)
    slope = torch.randn(*shape, 32, device=device)
    for scale in (0.0, 20.0):
        scaled = [tensors[0] * scale, *tensors[1:]]
        with force("triton"):
            copies = leaves(scaled, torch.float16)
            y = attention(2, options)(*copies)
            gradients = torch.autograd.grad(y, copies, slope.to(y.dtype))
        assert all(x.isfinite().all() for x in (y, *gradients))
        # One key outweighs the others, and a rounding may choose another: float32 alone tells.
        if scale == 0.0:
            assert_as_exact_as_eager(attention(2, options), scaled, torch.float32, slope)


@pytest.mark.triton
def test_every_element_is_written(device, monkeypatch) -> None:
    poison_memory(monkeypatch)
    for options in (
        {"windows": [(SMALL, SMALL)], "shift": (2, 2)},
        {"windows": [(LARGE, LARGE)], "shift": (3, 3)},
        {"windows": [(3, 2 * LARGE), (2, LARGE)]},
    ):
        tensors = leaves(case((1, 4, LARGE + 1), 2, 16, options, device), torch.float32)
        with force("triton"):
            y = attention(2, options)(*tensors)
            wanted = [x for x in tensors if x is not None]
            gradients = torch.autograd.grad(y.sum(), wanted)
        assert all(x.isfinite().all() for x in (y, *gradients))


@pytest.mark.triton
def test_registration(device) -> None:
    for windows, shift, padding in (([2, 3], [1, 1], "end"), ([3, 2, 2, 4], [0, 0], "centre")):
        options = {"windows": [(2, 3)]} if len(windows) == 2 else {"windows": [(3, 2), (2, 4)]}
        tensors = case((1, 3, 4), 2, 8, options, device)
        tensors = [None if x is None else x.requires_grad_() for x in tensors]
        torch.library.opcheck(
            torch.ops.linsight.window_attention.default, (*tensors, 2, windows, shift, padding)
        )


@pytest.mark.triton
def test_compiles_without_a_graph_break(device) -> None:
    _, table, fill, *_ = case((1, 4, 4), 2, 8, {"windows": [(4, 4)]}, device)
    table.requires_grad_()

    def function(x: Tensor) -> Tensor:
        y = attention(2, {"windows": [(3, 3)], "shift": (1, 1)})(x, table, fill, None, None)
        stripes = {"windows": [(x.shape[1], 2), (2, x.shape[2])], "padding": "centre"}
        return y + attention(2, stripes)(x, None, None, None, None)

    whole = compile_whole(function)
    for size in (2, 3, 5):
        x = torch.randn(1, size, size + 1, 48, device=device)
        with force("triton"):
            y, z = function(x), whole(x)
            torch.testing.assert_close(z, y)
            gradients = [torch.autograd.grad(result.sum(), table)[0] for result in (y, z)]
            torch.testing.assert_close(*gradients)


@pytest.mark.triton
def test_autocast_keeps_the_dtype_of_the_projection(device, seed) -> None:
    options = {"windows": [(4, 4)], "shift": (2, 2)}
    tensors = case((1, 6, 5), 2, 16, options, device)
    tensors[0] = tensors[0].bfloat16()
    results = []
    for choice in ("reference", "triton"):
        copies = [x.detach().clone().requires_grad_() for x in tensors]
        with force(choice), torch.autocast(device.type, torch.bfloat16):
            y = attention(2, options)(*copies)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), copies)])
    for ours, eager in zip(*results, strict=True):
        assert ours.dtype == eager.dtype
        assert distance(ours, eager.double()) < 0.03
