# ruff: noqa: RUF005 -- Triton's compiler knows a tuple's sum, not its unpacking
"""The Triton kernels of `depthwise_conv2d` from two maps to a weight: the weight gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from ..runtime.mathematics import activate, sum_rows
from .convolution import SCALARS, enter_phase, find_phase, load_strip
from .plan import plan
from .reference import has_own_windows


@triton.jit
def _load_row(
    x, grad, x_c, g_c, w, live, width, inside, KW: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """A row of the gradient with its margins, and the strip's row of x, if `inside` the map."""
    slopes = load_strip(grad, g_c, w, live, width, KW, P)
    values = ()
    for p in tl.static_range(P):
        ok = live & (w + p < width) & inside
        values = values + (tl.load(x + p * x_c, mask=ok, other=0.0),)
    return slopes, values


@triton.jit(do_not_specialize=SCALARS)
def _weigh(
    x, grad, parts,
    x_b, x_r, x_c, g_b, g_r, g_c,
    height, width, channels, rows, strips, batch, images, dilation,
    KH: tl.constexpr, KW: tl.constexpr, P: tl.constexpr, LANES: tl.constexpr, BC: tl.constexpr,
    ACTIVATION: tl.constexpr, DILATED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Stride 1: each lane's part of the weight gradient, (KH * KW + 1, channels), bias last.

    The strips partition the columns of x in a phase, the row chunks the rows of the gradient, and
    the programs the phases and images, so that every product is counted once.
    """
    PAD: tl.constexpr = KH // 2
    SIDE: tl.constexpr = KW // 2
    TAPS: tl.constexpr = KH * KW
    first = tl.program_id(1) * rows
    program, up, left, height, width = find_phase(height, width, first, dilation, DILATED)
    x, x_r, x_c = enter_phase(x, up, left, x_r, x_c, dilation, DILATED)
    grad, g_r, g_c = enter_phase(grad, up, left, g_r, g_c, dilation, DILATED)
    lane = program * LANES + tl.arange(0, LANES)[:, None]
    c = (lane // strips) * BC + tl.arange(0, BC)[None, :]
    live = c < channels
    w = (lane % strips) * P
    last = tl.minimum(first + rows, height)
    # Rows first - PAD .. first + PAD - 1 of x; the loop brings the last of its window.
    b = tl.program_id(2) * images
    x += b.to(tl.int64) * x_b + (first - PAD).to(tl.int64) * x_r + (w * x_c + c)
    grad += b.to(tl.int64) * g_b + first.to(tl.int64) * g_r + ((w - SIDE) * g_c + c)

    sums = ()
    for _ in tl.static_range(TAPS + 1):
        sums = sums + (tl.zeros((LANES, BC), tl.float32),)
    for _ in range(b, tl.minimum(b + images, batch)):
        at = x
        slope_at = grad
        window = ()
        for j in tl.static_range(KH - 1):
            row = first + (j - PAD)
            for p in tl.static_range(P):
                ok = live & (w + p < width) & (row >= 0) & (row < height)
                value = tl.load(at + p * x_c, mask=ok, other=0.0).to(tl.float32)
                value = activate(value, ACTIVATION, EXACT)
                window = window + (value,)
            at += x_r
        slopes_ahead, values_ahead = _load_row(
            at, slope_at, x_c, g_c, w, live, width, first + PAD < height, KW, P
        )
        for row in range(first, last):
            slopes = ()
            for i in tl.static_range(P + KW - 1):
                slopes = slopes + (slopes_ahead[i].to(tl.float32),)
            for p in tl.static_range(P):
                value = values_ahead[p].to(tl.float32)
                value = activate(value, ACTIVATION, EXACT)
                window = window + (value,)
            at += x_r
            slope_at += tl.where(row + 1 < last, g_r, 0)
            inside = (row + 1 + PAD < height) & (row + 1 < last)
            slopes_ahead, values_ahead = _load_row(
                at, slope_at, x_c, g_c, w, live, width, inside, KW, P
            )
            fresh = ()
            for j in tl.static_range(KH):
                for i in tl.static_range(KW):
                    total = sums[j * KW + i]
                    for p in tl.static_range(P):
                        total += window[j * P + p] * slopes[p + (KW - 1 - i)]
                    fresh = fresh + (total,)
            total = sums[TAPS]
            for p in tl.static_range(P):
                total += slopes[p + SIDE]
            sums = fresh + (total,)
            rest = ()
            for p in tl.static_range(P * (KH - 1)):
                rest = rest + (window[P + p],)
            window = rest
        x += x_b
        grad += g_b

    place = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    if DILATED:
        place = (place * dilation + up) * dilation + left
    place = place * strips + lane % strips
    parts += place.to(tl.int64) * ((TAPS + 1) * channels) + c
    for i in tl.static_range(TAPS + 1):
        tl.store(parts + i * channels, sums[i], mask=live)


@triton.jit(do_not_specialize=SCALARS)
def _weigh_taps(
    x, grad, parts,
    x_b, x_r, x_c, g_b, g_r, g_c,
    height, width, out_height, out_width, channels, rows,
    KH: tl.constexpr, KW: tl.constexpr, BLOCK: tl.constexpr, BC: tl.constexpr,
    ACTIVATION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Stride 2: one tap's part of the weight gradient over one chunk of the output's pixels."""
    PAD: tl.constexpr = KH // 2
    SIDE: tl.constexpr = KW // 2
    TAPS: tl.constexpr = KH * KW
    b = tl.program_id(2).to(tl.int64)
    tap = tl.program_id(1) % (TAPS + 1)
    chunk = tl.program_id(1) // (TAPS + 1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    live = (c < channels)[None, :]
    x += b * x_b
    grad += b * g_b
    total = tl.zeros((BLOCK, BC), tl.float32)
    last = tl.minimum((chunk + 1) * rows, out_height) * out_width
    for start in range(chunk * rows * out_width, last, BLOCK):
        pixel = start + tl.arange(0, BLOCK)[:, None]
        row = pixel // out_width
        column = pixel - row * out_width
        ok = live & (pixel < last)
        at = grad + row.to(tl.int64) * g_r + column * g_c + c[None, :]
        slope = tl.load(at, mask=ok, other=0.0).to(tl.float32)
        r = row * 2 + (tap // KW - PAD)
        s = column * 2 + (tap % KW - SIDE)
        ok = ok & (r >= 0) & (r < height) & (s >= 0) & (s < width) & (tap < TAPS)
        at = x + r.to(tl.int64) * x_r + s * x_c + c[None, :]
        value = tl.load(at, mask=ok, other=0.0).to(tl.float32)
        value = activate(value, ACTIVATION, EXACT)
        total += slope * tl.where(tap < TAPS, value, 1.0)
    chunks = tl.num_programs(1) // (TAPS + 1)
    place = (tl.program_id(2) * chunks + chunk) * (TAPS + 1) + tap
    tl.store(parts + place.to(tl.int64) * channels + c, tl.sum(total, 0), mask=c < channels)


@triton.jit(do_not_specialize=["count", "channels"])
def _sum_parts(
    parts, dweight, dbias, count, channels,
    TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of `count` parts; further ones are those of further images with their own windows."""
    tap = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = c < channels
    stride = (TAPS + 1) * channels
    parts += image * count * stride
    dweight += image * channels * TAPS
    dbias += image * channels
    total = sum_rows(parts + tap * channels, count, stride, c, live, ROWS, BLOCK)
    if tap < TAPS:
        tl.store(dweight + c * TAPS + tap, total.to(dweight.dtype.element_ty), mask=live)
    else:
        tl.store(dbias + c, total.to(dbias.dtype.element_ty), mask=live)


def weight_gradient(
    grad: Tensor, x: Tensor, stride: int, activation: str | None, dweight: Tensor, dbias: Tensor,
    dilation: int = 1,
) -> None:  # fmt: skip
    """Write the gradients of weight (channels, 1, h, w) and bias to `dweight` and `dbias`.

    With a window for each image they are (B, channels, h, w) and, per image, (B * channels,).
    """
    how = plan(
        x.shape, x.dtype, x.device, dweight.shape[2:], stride, activation,
        own=has_own_windows(x, dweight), dilation=dilation,
    )  # fmt: skip
    parts = torch.empty(how.parts, dtype=torch.float32, device=x.device)
    kernel = _weigh if stride == 1 else _weigh_taps
    launch(kernel, how.weight_gradient, x, grad, parts, *x.stride()[:3], *grad.stride()[:3])
    launch(_sum_parts, how.sum_parts, parts, dweight, dbias)
