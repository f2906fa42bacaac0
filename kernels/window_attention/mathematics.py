"""Tokens of windows, in Triton: where they lie in the map, and what their scores are.

A window's number and a token's place in it give the image, row and column that the roll, the
padding and the partition would have taken it from. `geometry` is (height, width) of the map,
(rows, columns) of windows, (wh, ww) of a window, (sh, sw) of the shift, (top, left) of the
padding, and the (period_h, period_w) of the roll.
"""

import triton
import triton.language as tl

from ..runtime.mathematics import exponential, multiply
from .reference import MASK

MASKED = tl.constexpr(-1e30)
REGION_MASK = tl.constexpr(MASK)

# Sizes that vary with the image: no kernel is compiled anew for them.
SCALARS = [
    "height",
    "width",
    "rows",
    "columns",
    "wh",
    "ww",
    "sh",
    "sw",
    "top",
    "left",
    "period_h",
    "period_w",
    "total",
    "per",
    "tiles",
    "head",
    "share",
]


@triton.jit
def locate(window, y, x, geometry):
    """Image, row and column of the window's token (y, x), and whether it is in the map."""
    height, width, rows, columns, wh, ww, sh, sw, top, left, period_h, period_w = geometry
    image = window // (rows * columns)
    place = window % (rows * columns)
    i = (place // columns) * wh + y
    j = (place % columns) * ww + x
    real = (i < period_h) & (j < period_w)
    i += sh % period_h  # a map may be smaller than the shift of its windows
    j += sw % period_w
    i = tl.where(i >= period_h, i - period_h, i) - top
    j = tl.where(j >= period_w, j - period_w, j) - left
    real = real & (i >= 0) & (i < height) & (j >= 0) & (j < width)
    return image.to(tl.int64), i.to(tl.int64), j.to(tl.int64), real


@triton.jit
def edge_of(y, x, geometry):
    """Which of the four parts that the roll brought together a token of the last window is in."""
    wh, ww, sh, sw = geometry[4], geometry[5], geometry[6], geometry[7]
    return (y >= wh - sh).to(tl.int32) * 2 + (x >= ww - sw).to(tl.int32)


@triton.jit
def region_of(window, edge, geometry):
    """The part that a token is in, or 0 if `window` has only one part."""
    rows, columns = geometry[2], geometry[3]
    place = window % (rows * columns)
    below = (place // columns == rows - 1).to(tl.int32)
    right = (place % columns == columns - 1).to(tl.int32)
    return edge & (below * 2 + right)


@triton.jit
def load_rows(
    base, strides, place, known, fill, D: tl.constexpr, P: tl.constexpr, FILL: tl.constexpr
):
    """The tokens' rows (T, P); a token that is `known` but not in the map is `fill`, or zero."""
    image, i, j, real = place
    d = tl.arange(0, P)[None, :]
    at = image * strides[0] + i * strides[1] + j * strides[2]
    value = tl.load(base + at[:, None] + d, mask=(real & known)[:, None] & (d < D), other=0.0)
    if FILL:
        row = tl.load(fill + d, mask=d < D, other=0.0).to(value.dtype)
        value = tl.where((known & (real == 0))[:, None], row, value)
    return value


@triton.jit
def store_rows(base, strides, place, known, value, D: tl.constexpr, P: tl.constexpr):
    image, i, j, real = place
    d = tl.arange(0, P)[None, :]
    at = image * strides[0] + i * strides[1] + j * strides[2]
    mask = (real & known)[:, None] & (d < D)
    tl.store(base + at[:, None] + d, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def position_bias(
    table, t, s, ww, heads,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Bias of queries `t` against keys `s`; tokens beyond the window get a row of the table."""
    dy = (t // ww)[:, None] - (s // ww)[None, :]
    dx = (t % ww)[:, None] - (s % ww)[None, :]
    index = (dy + ROWS // 2) * COLUMNS + dx + COLUMNS // 2
    inside = (index >= 0) & (index < ROWS * COLUMNS)
    return tl.load(table + index * heads, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def convolve(
    total, base, strides, window, y, x, geometry, weight, fill,
    D: tl.constexpr, P: tl.constexpr, K: tl.constexpr, FILL: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """`total` plus the depthwise convolution within the window, or its transpose if `TURNED`."""
    wh = geometry[4]
    ww = geometry[5]
    d = tl.arange(0, P)
    for tap in tl.static_range(K * K):
        if TURNED:
            v = y + (K // 2 - tap // K)
            u = x + (K // 2 - tap % K)
        else:
            v = y + (tap // K - K // 2)
            u = x + (tap % K - K // 2)
        known = (y < wh) & (v >= 0) & (v < wh) & (u >= 0) & (u < ww)
        value = load_rows(base, strides, locate(window, v, u, geometry), known, fill, D, P, FILL)
        factor = tl.load(weight + d * (K * K) + tap, mask=d < D, other=0.0).to(tl.float32)
        total += value.to(tl.float32) * factor[None, :]
    return total


@triton.jit
def scores_of(
    q, k, bias, region, key_region, known, scale, TABLE: tl.constexpr, SHIFT: tl.constexpr
):
    s = multiply(q, tl.trans(k)) * scale
    if TABLE:
        s += bias
    if SHIFT:
        s += tl.where(region[:, None] != key_region[None, :], REGION_MASK, 0.0)
    return tl.where(known[None, :], s, MASKED)


@triton.jit
def weigh(s, maximum, known, EXACT: tl.constexpr):
    """exp(s - maximum), and 0 for keys beyond the window."""
    if EXACT:  # its exp takes no argument so small as the mask
        e = tl.where(known[None, :], s - maximum[:, None], -1e4)
        return exponential(tl.maximum(e, -1e4), EXACT)
    else:
        return exponential(s - maximum[:, None], EXACT)
