"""The Triton kernels of an image's convolution: its patches as a product.

A tile of patches is (taps, pixels): the lanes of a warp read neighbouring pixels for one tap. It is
multiplied by the weight's (O, taps) or, for the weight's gradient, by that of the result; one more
tap, which is one everywhere, gives the bias's gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from ..runtime.mathematics import activate, multiply
from .plan import plan_image


@triton.jit
def _patches(
    x, n, tap, x_b, x_c, x_h, x_w, height, width, out_height, out_width, pixels,
    CHANNELS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
):  # fmt: skip
    """The values under the taps of result n, (taps, pixels); zero beyond the image or the taps."""
    area = out_height * out_width
    row = ((n % area) // out_width)[None, :] * SH - PH + (tap // KW % KH)[:, None]
    column = (n % out_width)[None, :] * SW - PW + (tap % KW)[:, None]
    channel = (tap // (KH * KW))[:, None]
    ok = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    ok &= (channel < CHANNELS) & (n < pixels)[None, :]
    at = (n // area).to(tl.int64)[None, :] * x_b + channel * x_c + row * x_h + column * x_w
    return tl.load(x + at, mask=ok, other=0.0)


# Sizes that change from image to image and do not need other machine code.
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
    how = plan_image(
        x.stride(), x.shape[2:], weight.shape, stride, padding, out.shape, out.dtype, x.device,
        bias is not None, activation,
    )  # fmt: skip
    launch(_convolve_image, how.convolve, x, weight, weight if bias is None else bias, out)


def image_weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias in float32, from `grad`, (B, H', W', O) contiguous."""
    how = plan_image(
        x.stride(), x.shape[2:], weight, stride, padding, grad.shape, grad.dtype, x.device
    )
    parts = torch.empty(how.parts, dtype=torch.float32, device=x.device)
    launch(_image_weight_gradient, how.weight_gradient, x, grad, parts)
    total = parts.sum(0)
    return total[:-1].t().reshape(weight), total[-1]
