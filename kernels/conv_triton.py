"""The Triton kernels of `conv2d`: bias and activation in place; an image's patches as a product.

A tile of patches is (taps, pixels): a warp's lanes read neighbouring pixels for one tap. What it is
multiplied by is the weight's (O, taps), or of the weight's gradient that of the result; a tap more,
which is one everywhere, gives the bias's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import launch, multiprocessors
from .triton_math import activate, multiply

# Elements of a program: 16 bytes a load and thread, two of them under way.
ELEMENTS, WARPS = 2048, 4


@triton.jit(do_not_specialize=["pixels"])
def _finish(
    y, bias, pixels,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, P)[None, :]
    ok = (n < pixels) & (c < C)
    at = y + n * C + c
    value = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    value += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    value = activate(value, ACTIVATION, EXACT)
    tl.store(at, value.to(y.dtype.element_ty), mask=ok)


@triton.jit
def _patches(
    x, n, tap, x_b, x_c, x_h, x_w, height, width, out_height, out_width, pixels,
    CHANNELS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
):  # fmt: skip
    """What result n's taps are multiplied by, (taps, pixels); zero beyond the image or the taps."""
    area = out_height * out_width
    row = ((n % area) // out_width)[None, :] * SH - PH + (tap // KW % KH)[:, None]
    column = (n % out_width)[None, :] * SW - PW + (tap % KW)[:, None]
    channel = (tap // (KH * KW))[:, None]
    ok = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    ok &= (channel < CHANNELS) & (n < pixels)[None, :]
    at = (n // area).to(tl.int64)[None, :] * x_b + channel * x_c + row * x_h + column * x_w
    return tl.load(x + at, mask=ok, other=0.0)


# No other image wants other machine code.
SIZES = ["x_b", "x_c", "x_h", "height", "width", "out_height", "out_width", "pixels"]


@triton.jit(do_not_specialize=SIZES)
def _convolve_image(
    x, weight, bias, out, x_b, x_c, x_h, x_w, height, width, out_height, out_width, pixels,
    outputs,
    CHANNELS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    BLOCK: tl.constexpr, PIXELS: tl.constexpr, STEP: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = CHANNELS * KH * KW
    n = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = o < outputs
    y = tl.zeros((BLOCK, PIXELS), tl.float32)
    for start in tl.static_range(0, TAPS, STEP):
        tap = start + tl.arange(0, STEP)
        patch = _patches(
            x, n, tap, x_b, x_c, x_h, x_w, height, width, out_height, out_width, pixels,
            CHANNELS, KH, KW, SH, SW, PH, PW,
        )  # fmt: skip
        ok = live[:, None] & (tap < TAPS)[None, :]
        w = tl.load(weight + o[:, None] * TAPS + tap[None, :], mask=ok, other=0.0)
        y = multiply(w.to(out.dtype.element_ty), patch.to(out.dtype.element_ty), y)
    if BIAS:
        y += tl.load(bias + o, mask=live, other=0.0).to(tl.float32)[:, None]
    y = tl.trans(activate(y, ACTIVATION, EXACT))
    at = out + n.to(tl.int64)[:, None] * outputs + o[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=(n < pixels)[:, None] & live[None, :])


@triton.jit(do_not_specialize=SIZES)
def _image_weight_gradient(
    x, grad, parts, x_b, x_c, x_h, x_w, height, width, out_height, out_width, pixels,
    outputs,
    CHANNELS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    BLOCK: tl.constexpr, PIXELS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """This program's part (taps + 1, O) of the gradients of weight and, last, bias."""
    TAPS: tl.constexpr = CHANNELS * KH * KW
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tap = tl.program_id(2) * STEP + tl.arange(0, STEP)
    live = o < outputs
    total = tl.zeros((STEP, BLOCK), tl.float32)
    tiles = tl.cdiv(pixels, PIXELS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        n = tile * PIXELS + tl.arange(0, PIXELS)
        patch = _patches(
            x, n, tap, x_b, x_c, x_h, x_w, height, width, out_height, out_width, pixels,
            CHANNELS, KH, KW, SH, SW, PH, PW,
        )  # fmt: skip
        patch = tl.where((tap == TAPS)[:, None], 1.0, patch.to(tl.float32))
        ok = (n < pixels)[:, None] & live[None, :]
        g = tl.load(grad + n.to(tl.int64)[:, None] * outputs + o[None, :], mask=ok, other=0.0)
        total = multiply(patch.to(g.dtype), g, total)
    ok = (tap < TAPS + 1)[:, None] & live[None, :]
    parts += tl.program_id(0).to(tl.int64) * outputs * (TAPS + 1)
    tl.store(parts + tap[:, None] * outputs + o[None, :], total, mask=ok)


def finish(y: Tensor, bias: Tensor, activation: str | None) -> None:
    """Add the bias to each pixel of `y`, (B, C, H, W) in the channels-last format, and activate."""
    channels = y.shape[1]
    pixels = y.numel() // channels
    padded = triton.next_power_of_2(channels)
    rows = max(1, ELEMENTS // padded)
    if pixels:
        launch(
            _finish, (triton.cdiv(pixels, rows),), y, bias, pixels,
            C=channels, P=padded, ROWS=rows,
            ACTIVATION=activation, EXACT=y.element_size() == 4, num_warps=WARPS,
        )  # fmt: skip


# Of a tile: the most channels of the result; its elements and the most taps of a step, forward and
# of the weight's gradient. That reads image and gradient once for all its taps.
MOST_OUTPUTS = 128
TILE, TAPS = 4096, 16
GRADIENT_TILE, GRADIENT_TAPS = 2048, 64
FEWEST_PIXELS, MOST_PIXELS = 32, 128
# Programs a multiprocessor that sum the weight's gradient.
RESIDENT = 8


def _image_sizes(
    x: Tensor,
    weight: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    out: Tensor,
    tile: int,
) -> tuple[tuple[int, ...], int, dict]:
    """The sizes that vary, tiles of pixels, and the sizes that are compiled in."""
    outputs, channels, kernel_height, kernel_width = weight
    # The tensor cores take 16 rows and columns at least.
    block = min(MOST_OUTPUTS, max(16, triton.next_power_of_2(outputs)))
    pixels = out.numel() // outputs
    sizes = {
        "CHANNELS": channels, "KH": kernel_height, "KW": kernel_width,
        "SH": stride[0], "SW": stride[1], "PH": padding[0], "PW": padding[1],
        "BLOCK": block, "PIXELS": min(MOST_PIXELS, max(FEWEST_PIXELS, tile // block)),
        "num_warps": WARPS, "num_stages": 1,
    }  # fmt: skip
    varying = (*x.stride(), *x.shape[2:], *out.shape[1:3], pixels, outputs)
    return varying, triton.cdiv(pixels, sizes["PIXELS"]), sizes


def _step(taps: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(taps)))


def convolve_image(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    activation: str | None,
    out: Tensor,
) -> None:
    """Write a(conv(x) + bias) to `out`, (B, H', W', O) contiguous."""
    varying, tiles, sizes = _image_sizes(x, weight.shape, stride, padding, out, TILE)
    launch(
        _convolve_image, (tiles, triton.cdiv(weight.shape[0], sizes["BLOCK"])),
        x, weight, weight if bias is None else bias, out, *varying,
        STEP=_step(weight[0].numel(), TAPS), BIAS=bias is not None, ACTIVATION=activation,
        EXACT=out.element_size() == 4, **sizes,
    )  # fmt: skip


def image_weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias in float32, of that of the result, (B, H', W', O) contiguous."""
    outputs, taps = weight[0], weight[1:].numel()
    varying, tiles, sizes = _image_sizes(x, weight, stride, padding, grad, GRADIENT_TILE)
    step = _step(taps + 1, GRADIENT_TAPS)
    blocks = triton.cdiv(outputs, sizes["BLOCK"]), triton.cdiv(taps + 1, step)
    programs = min(tiles, max(1, RESIDENT * multiprocessors(x.device) // (blocks[0] * blocks[1])))
    parts = torch.empty((programs, taps + 1, outputs), dtype=torch.float32, device=x.device)
    launch(
        _image_weight_gradient, (programs, *blocks), x, grad, parts, *varying, STEP=step, **sizes
    )  # fmt: skip
    total = parts.sum(0)
    return total[:-1].t().reshape(weight), total[-1]
