# ruff: noqa: RUF005 -- Triton's compiler knows a tuple's sum, not its unpacking
"""The Triton kernels of `depthwise_conv2d`: the convolution, its input and its weight gradient.

At stride 1 a program walks down the map over a strip of columns. The window's rows live in
registers, as sums not yet complete, so that a pixel is loaded, converted and activated once a
strip and not once a tap. Few channels a thread (two, for k = 5) leave room for the k * k taps.
At stride 2 the taps are gathered one by one.

The weight gradient is summed in a fixed order, in two stages, so two runs agree bit for bit.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import launch, multiprocessors
from .triton_math import exp2_approximate, reciprocal_approximate, sum_rows


@triton.jit
def _normal_cdf(x, EXACT: tl.constexpr):
    if EXACT:
        return 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)
    else:
        # Its logit, an odd polynomial fitted for |x| times the error < 3e-5: a third of erf's
        # arithmetic, which would cost more than reading and writing half-precision values does.
        u = tl.minimum(x * x, 49.0)
        logit = (u * 1.0142692e-3 - 0.10677576) * u - 2.3011213
        return reciprocal_approximate(1.0 + exp2_approximate(x * logit))


@triton.jit
def _gelu(x, EXACT: tl.constexpr):
    return x * _normal_cdf(x, EXACT)


@triton.jit
def _gelu_gradient(x, EXACT: tl.constexpr):
    density = tl.exp(-0.5 * x * x) if EXACT else exp2_approximate(x * x * -0.7213475204444817)
    return _normal_cdf(x, EXACT) + x * 0.3989422804014327 * density


# Not `channels`: that it is a multiple of 16 is what lets two of them be one load.
_SCALARS = ["height", "width", "out_height", "out_width", "rows", "groups"]


@triton.jit(do_not_specialize=_SCALARS)
def _convolve(
    x, weight, bias, pre, add, y,
    x_b, x_r, x_c, p_b, p_r, p_c, a_b, a_r, a_c, y_b, y_r, y_c,
    height, width, channels, rows, groups,
    K: tl.constexpr, P: tl.constexpr, STRIPS: tl.constexpr, BC: tl.constexpr,
    GELU: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    BACKWARD: tl.constexpr, ADD: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Stride 1. Forward: y = conv(a(x)) + bias. Backward: x is the gradient of the output, the
    window is turned round, and y is the gradient of `pre`, the input before the activation.
    """
    PAD: tl.constexpr = K // 2
    b = tl.program_id(2).to(tl.int64)
    c = (tl.program_id(0) // groups) * BC + tl.arange(0, BC)[None, :]
    live = c < channels
    w = ((tl.program_id(0) % groups) * STRIPS + tl.arange(0, STRIPS)[:, None]) * P
    first = tl.program_id(1) * rows
    last = tl.minimum(first + rows, height)
    # The rows of x that there are; those above and below the map add nothing.
    top = tl.maximum(first - PAD, 0)
    bottom = tl.minimum(last + PAD, height)
    x += b * x_b + top.to(tl.int64) * x_r + ((w - PAD) * x_c + c)
    y += b * y_b + (top - PAD).to(tl.int64) * y_r + (w * y_c + c)
    if BACKWARD and GELU:
        pre += b * p_b + (top - PAD).to(tl.int64) * p_r + (w * p_c + c)
    if ADD:
        add += b * a_b + (top - PAD).to(tl.int64) * a_r + (w * a_c + c)

    taps = ()
    for i in tl.static_range(K * K):
        tap = tl.load(weight + c * (K * K) + i, mask=live, other=0.0).to(tl.float32)
        if RESIDUAL and i == K * K // 2:
            tap += 1.0
        taps = taps + (tap,)
    start = tl.zeros((STRIPS, BC), tl.float32)
    if BIAS:
        start += tl.load(bias + c, mask=live, other=0.0).to(tl.float32)
    sums = ()
    for _ in tl.static_range(P * K):
        sums = sums + (start,)
    ahead = ()
    for i in tl.static_range(P + K - 1):
        ok = live & (w + (i - PAD) >= 0) & (w + (i - PAD) < width)
        ahead = ahead + (tl.load(x + i * x_c, mask=ok, other=0.0),)
    for row in range(top, bottom):
        done = row - PAD >= first
        factors = ()
        addends = ()
        for p in tl.static_range(P):
            ok = live & (w + p < width) & done
            if BACKWARD and GELU:
                factors = factors + (tl.load(pre + p * p_c, mask=ok, other=0.0),)
            if ADD:
                addends = addends + (tl.load(add + p * a_c, mask=ok, other=0.0),)
        window = ()
        for i in tl.static_range(P + K - 1):
            value = ahead[i].to(tl.float32)
            if GELU and not BACKWARD:
                value = _gelu(value, EXACT)
            window = window + (value,)
        # The last row is loaded twice: cheaper than to ask at every load.
        x += tl.where(row + 1 < bottom, x_r, 0)
        ahead = ()
        for i in tl.static_range(P + K - 1):
            ok = live & (w + (i - PAD) >= 0) & (w + (i - PAD) < width)
            ahead = ahead + (tl.load(x + i * x_c, mask=ok, other=0.0),)
        fresh = ()
        for p in tl.static_range(P):
            for j in tl.static_range(K):
                total = sums[p * K + j]
                for i in tl.static_range(K):
                    if BACKWARD:
                        total += taps[j * K + (K - 1 - i)] * window[p + i]
                    else:
                        total += taps[(K - 1 - j) * K + i] * window[p + i]
                fresh = fresh + (total,)
        sums = ()
        for p in tl.static_range(P):
            total = fresh[p * K]
            if BACKWARD and GELU:
                total *= _gelu_gradient(factors[p].to(tl.float32), EXACT)
            if ADD:
                total += addends[p].to(tl.float32)
            ok = live & (w + p < width) & done
            tl.store(y + p * y_c, total.to(y.dtype.element_ty), mask=ok)
            for j in tl.static_range(K - 1):
                sums = sums + (fresh[p * K + j + 1],)
            sums = sums + (start,)
        y += y_r
        if BACKWARD and GELU:
            pre += p_r
        if ADD:
            add += a_r
    # The map's last rows, which no further row of x completes.
    for j in tl.static_range(PAD):
        ends = (bottom - PAD + j >= first) & (bottom - PAD + j < last)
        for p in tl.static_range(P):
            ok = live & (w + p < width) & ends
            total = sums[p * K + j]
            if BACKWARD and GELU:
                at = pre + p * p_c
                total *= _gelu_gradient(tl.load(at, mask=ok, other=0.0).to(tl.float32), EXACT)
            if ADD:
                total += tl.load(add + p * a_c, mask=ok, other=0.0).to(tl.float32)
            tl.store(y + p * y_c, total.to(y.dtype.element_ty), mask=ok)
        y += y_r
        if BACKWARD and GELU:
            pre += p_r
        if ADD:
            add += a_r


@triton.jit
def _load_row(
    x, grad, x_c, g_c, w, live, width, inside, K: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """A row of the gradient with its margins, and the strip's row of x, if `inside` the map."""
    slopes = ()
    for i in tl.static_range(P + K - 1):
        ok = live & (w + (i - K // 2) >= 0) & (w + (i - K // 2) < width)
        slopes = slopes + (tl.load(grad + i * g_c, mask=ok, other=0.0),)
    values = ()
    for p in tl.static_range(P):
        ok = live & (w + p < width) & inside
        values = values + (tl.load(x + p * x_c, mask=ok, other=0.0),)
    return slopes, values


@triton.jit(do_not_specialize=_SCALARS)
def _weigh(
    x, grad, parts,
    x_b, x_r, x_c, g_b, g_r, g_c,
    height, width, channels, rows, groups,
    K: tl.constexpr, P: tl.constexpr, STRIPS: tl.constexpr, BC: tl.constexpr,
    GELU: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Stride 1: one program's part of the weight gradient, (K * K + 1, channels), bias last.

    The strips partition the columns of x and the row chunks those of the gradient, so that
    every product is counted once.
    """
    PAD: tl.constexpr = K // 2
    b = tl.program_id(2).to(tl.int64)
    group = tl.program_id(0) % groups
    c = (tl.program_id(0) // groups) * BC + tl.arange(0, BC)[None, :]
    live = c < channels
    w = (group * STRIPS + tl.arange(0, STRIPS)[:, None]) * P
    first = tl.program_id(1) * rows
    last = tl.minimum(first + rows, height)
    # Rows first - PAD .. first + PAD - 1 of x; the loop brings the K-th of its window.
    x += b * x_b + (first - PAD).to(tl.int64) * x_r + (w * x_c + c)
    grad += b * g_b + first.to(tl.int64) * g_r + ((w - PAD) * g_c + c)

    sums = ()
    for _ in tl.static_range(K * K + 1):
        sums = sums + (tl.zeros((STRIPS, BC), tl.float32),)
    window = ()
    for j in tl.static_range(K - 1):
        row = first + (j - PAD)
        for p in tl.static_range(P):
            ok = live & (w + p < width) & (row >= 0) & (row < height)
            value = tl.load(x + p * x_c, mask=ok, other=0.0).to(tl.float32)
            if GELU:
                value = _gelu(value, EXACT)
            window = window + (value,)
        x += x_r
    slopes_ahead, values_ahead = _load_row(
        x, grad, x_c, g_c, w, live, width, first + PAD < height, K, P
    )
    for row in range(first, last):
        slopes = ()
        for i in tl.static_range(P + K - 1):
            slopes = slopes + (slopes_ahead[i].to(tl.float32),)
        for p in tl.static_range(P):
            value = values_ahead[p].to(tl.float32)
            if GELU:
                value = _gelu(value, EXACT)
            window = window + (value,)
        x += x_r
        grad += tl.where(row + 1 < last, g_r, 0)
        slopes_ahead, values_ahead = _load_row(
            x, grad, x_c, g_c, w, live, width, (row + 1 + PAD < height) & (row + 1 < last), K, P
        )
        fresh = ()
        for j in tl.static_range(K):
            for i in tl.static_range(K):
                total = sums[j * K + i]
                for p in tl.static_range(P):
                    total += window[j * P + p] * slopes[p + (K - 1 - i)]
                fresh = fresh + (total,)
        total = sums[K * K]
        for p in tl.static_range(P):
            total += slopes[p + PAD]
        sums = fresh + (total,)
        kept = ()
        for p in tl.static_range(P * (K - 1)):
            kept = kept + (window[P + p],)
        window = kept

    place = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * groups + group
    parts += place.to(tl.int64) * (K * K + 1) * channels
    c = (tl.program_id(0) // groups) * BC + tl.arange(0, BC)
    for i in tl.static_range(K * K + 1):
        tl.store(parts + i * channels + c, tl.sum(sums[i], 0), mask=c < channels)


@triton.jit(do_not_specialize=_SCALARS)
def _gather(
    x, weight, bias, pre, y,
    x_b, x_r, x_c, p_b, p_r, p_c, y_b, y_r, y_c,
    height, width, out_height, out_width, channels,
    K: tl.constexpr, BLOCK: tl.constexpr, BC: tl.constexpr,
    GELU: tl.constexpr, BIAS: tl.constexpr, BACKWARD: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Stride 2, tap by tap; the map of `x` is height x width, that of `y` out_height x out_width.

    Backward as in `_convolve`: an output pixel gathers the taps that fall on even places.
    """
    PAD: tl.constexpr = K // 2
    b = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    live = c < channels
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    valid = live & (pixel < out_height * out_width)
    row = pixel // out_width
    column = pixel - row * out_width
    total = tl.zeros((BLOCK, BC), tl.float32)
    if BIAS:
        total += tl.load(bias + c, mask=live, other=0.0).to(tl.float32)
    x += b * x_b
    for tap in tl.static_range(K * K):
        if BACKWARD:
            r = row + (PAD - tap // K)
            s = column + (PAD - tap % K)
            ok = valid & (r % 2 == 0) & (s % 2 == 0)
            r = r // 2
            s = s // 2
        else:
            r = row * 2 + (tap // K - PAD)
            s = column * 2 + (tap % K - PAD)
            ok = valid
        ok = ok & (r >= 0) & (r < height) & (s >= 0) & (s < width)
        value = tl.load(x + r.to(tl.int64) * x_r + s * x_c + c, mask=ok, other=0.0).to(tl.float32)
        if GELU and not BACKWARD:
            value = _gelu(value, EXACT)
        factor = tl.load(weight + c * (K * K) + tap, mask=live, other=0.0).to(tl.float32)
        total += value * factor
    if BACKWARD and GELU:
        at = pre + b * p_b + row.to(tl.int64) * p_r + column * p_c + c
        total *= _gelu_gradient(tl.load(at, mask=valid, other=0.0).to(tl.float32), EXACT)
    at = y + b * y_b + row.to(tl.int64) * y_r + column * y_c + c
    tl.store(at, total.to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=_SCALARS)
def _weigh_gathered(
    x, grad, parts,
    x_b, x_r, x_c, g_b, g_r, g_c,
    height, width, out_height, out_width, channels, rows,
    K: tl.constexpr, BLOCK: tl.constexpr, BC: tl.constexpr,
    GELU: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Stride 2: one tap's part of the weight gradient over one chunk of the output's pixels."""
    PAD: tl.constexpr = K // 2
    b = tl.program_id(2).to(tl.int64)
    tap = tl.program_id(1) % (K * K + 1)
    chunk = tl.program_id(1) // (K * K + 1)
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
        r = row * 2 + (tap // K - PAD)
        s = column * 2 + (tap % K - PAD)
        ok = ok & (r >= 0) & (r < height) & (s >= 0) & (s < width) & (tap < K * K)
        at = x + r.to(tl.int64) * x_r + s * x_c + c[None, :]
        value = tl.load(at, mask=ok, other=0.0).to(tl.float32)
        if GELU:
            value = _gelu(value, EXACT)
        total += slope * tl.where(tap < K * K, value, 1.0)
    chunks = tl.num_programs(1) // (K * K + 1)
    place = (tl.program_id(2) * chunks + chunk) * (K * K + 1) + tap
    tl.store(parts + place.to(tl.int64) * channels + c, tl.sum(total, 0), mask=c < channels)


@triton.jit(do_not_specialize=["count", "channels"])
def _sum_parts(
    parts, dweight, dbias, count, channels,
    TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tap = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = c < channels
    stride = (TAPS + 1) * channels
    total = sum_rows(parts + tap * channels, count, stride, c, live, ROWS, BLOCK)
    if tap < TAPS:
        tl.store(dweight + c * TAPS + tap, total.to(dweight.dtype.element_ty), mask=live)
    else:
        tl.store(dbias + c, total.to(dbias.dtype.element_ty), mask=live)


@dataclass(frozen=True)
class Tile:
    """Columns a strip, strips times channels a program, the arithmetic an element relative to
    the other tiles, and the programs that a multiprocessor holds at once."""

    columns: int
    span: int
    cost: int
    resident: int


# By kernel size. Seven columns divide 224's maps, 56 .. 7, without a rest. Cost and residence
# are read off the machine code, see docs/performance.md.
CONVOLVE = {
    3: (Tile(4, 512, 36, 3), Tile(7, 256, 39, 3)),
    5: (Tile(4, 256, 40, 3), Tile(7, 256, 39, 2)),
    7: (Tile(4, 256, 66, 2),),
    9: (Tile(4, 128, 105, 2),),
}
WEIGH = {
    3: (Tile(4, 512, 36, 3), Tile(7, 256, 40, 3)),
    5: (Tile(4, 256, 49, 3), Tile(7, 256, 48, 2)),
    7: (Tile(4, 256, 80, 2),),
    9: (Tile(4, 128, 130, 2),),
}
WARPS = 4
# The sum of the programs' parts: many rows in flight, as it waits for little else.
SUM_ROWS, SUM_COLUMNS = 256, 16


def _layout(
    tiles: tuple[Tile, ...], kernel: int, shape: torch.Size, multiprocessors: int
) -> tuple[Tile, int, int]:
    """The tile that pads the map least, its channels a program, and the rows a program."""
    batch, height, width, channels = shape

    def work(choice: tuple[Tile, int]) -> int:
        tile, block = choice
        across = triton.cdiv(width, tile.columns * tile.span // block)
        return tile.cost * tile.span * tile.columns * triton.cdiv(channels, block) * across

    blocks = (64, 32, 128, 256)
    choices = ((tile, block) for tile in tiles for block in blocks if block <= tile.span)
    tile, block = min(choices, key=work)
    across = triton.cdiv(width, tile.columns * tile.span // block) * triton.cdiv(channels, block)

    def time(chunks: int) -> int:
        rows = triton.cdiv(height, chunks)
        programs = across * batch * triton.cdiv(height, rows)
        return triton.cdiv(programs, tile.resident * multiprocessors) * (rows + kernel + 1)

    chunks = min(range(1, max(1, height // kernel) + 1), key=time)
    return tile, block, triton.cdiv(height, chunks)


def _plan(tiles: tuple[Tile, ...], x: Tensor, kernel: int) -> tuple[tuple[int, int, int], dict]:
    """Grid, and the sizes that the stride-1 kernels share."""
    return _planned(tiles, x.shape, kernel, x.dtype == torch.float32, multiprocessors(x.device))


@lru_cache
def _planned(
    tiles: tuple[Tile, ...], shape: torch.Size, kernel: int, exact: bool, multiprocessors: int
) -> tuple[tuple[int, int, int], dict]:
    batch, height, width, channels = shape
    tile, block, rows = _layout(tiles, kernel, shape, multiprocessors)
    strips = tile.span // block
    groups = triton.cdiv(width, tile.columns * strips)
    grid = (triton.cdiv(channels, block) * groups, triton.cdiv(height, rows), batch)
    sizes = {
        "height": height,
        "width": width,
        "channels": channels,
        "rows": rows,
        "groups": groups,
        "K": kernel,
        "P": tile.columns,
        "STRIPS": strips,
        "BC": block,
        "EXACT": exact,
        "num_warps": WARPS,
        "num_stages": 1,
    }
    return grid, sizes


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]


def _gather_sizes(kernel: int, x: Tensor) -> dict:
    return {
        "K": kernel,
        "BLOCK": 32,
        "BC": 64,
        "EXACT": x.dtype == torch.float32,
        "num_warps": 4,
    }


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    gelu: bool,
    residual: bool,
    out: Tensor,
) -> None:
    """Write the convolution of `x` to `out`."""
    kernel = weight.shape[-1]
    flags = {"GELU": gelu, "BIAS": bias is not None, "BACKWARD": False}
    biases = weight if bias is None else bias
    if stride == 1:
        grid, sizes = _plan(CONVOLVE[kernel], x, kernel)
        launch(
            _convolve, grid,
            x, weight, biases, x, x, out, *_strides(x), 0, 0, 0, 0, 0, 0, *_strides(out),
            RESIDUAL=residual, ADD=False, **flags, **sizes,
        )  # fmt: skip
        return
    batch, height, width, channels = out.shape
    grid = (triton.cdiv(height * width, 32), triton.cdiv(channels, 64), batch)
    launch(
        _gather, grid,
        x, weight, biases, x, out, *_strides(x), 0, 0, 0, *_strides(out),
        x.shape[1], x.shape[2], height, width, channels, **flags, **_gather_sizes(kernel, x),
    )  # fmt: skip


def input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    gelu: bool,
    residual: bool,
    out: Tensor,
    add: Tensor | None = None,
) -> None:
    """Write the gradient of `x` to `out`, plus `add` if it is there (which may be `out`)."""
    kernel = weight.shape[-1]
    flags = {"GELU": gelu, "BIAS": False, "BACKWARD": True}
    if stride == 1:
        grid, sizes = _plan(CONVOLVE[kernel], x, kernel)
        launch(
            _convolve, grid,
            grad, weight, weight, x, grad if add is None else add, out,
            *_strides(grad), *_strides(x), *_strides(add), *_strides(out),
            RESIDUAL=residual, ADD=add is not None, **flags, **sizes,
        )  # fmt: skip
        return
    batch, height, width, channels = x.shape
    grid = (triton.cdiv(height * width, 32), triton.cdiv(channels, 64), batch)
    launch(
        _gather, grid,
        grad, weight, weight, x, out, *_strides(grad), *_strides(x), *_strides(out),
        grad.shape[1], grad.shape[2], height, width, channels,
        **flags, **_gather_sizes(kernel, x),
    )  # fmt: skip


def weight_gradient(
    grad: Tensor, x: Tensor, stride: int, gelu: bool, dweight: Tensor, dbias: Tensor
) -> None:
    """Write the gradients of weight (channels, 1, k, k) and bias to `dweight` and `dbias`."""
    batch, height, width, channels = grad.shape
    kernel = dweight.shape[-1]
    taps = kernel * kernel
    if stride == 1:
        grid, sizes = _plan(WEIGH[kernel], x, kernel)
        count = grid[1] * grid[2] * sizes["groups"]
    else:
        rows = triton.cdiv(height, 4)
        count = batch * triton.cdiv(height, rows)
    parts = torch.empty((count, taps + 1, channels), dtype=torch.float32, device=x.device)
    if stride == 1:
        launch(_weigh, grid, x, grad, parts, *_strides(x), *_strides(grad), GELU=gelu, **sizes)
    else:
        grid = (triton.cdiv(channels, 64), triton.cdiv(height, rows) * (taps + 1), batch)
        launch(
            _weigh_gathered, grid,
            x, grad, parts, *_strides(x), *_strides(grad),
            x.shape[1], x.shape[2], height, width, channels, rows,
            GELU=gelu, **_gather_sizes(kernel, x),
        )  # fmt: skip
    launch(
        _sum_parts, (taps + 1, -(-channels // SUM_COLUMNS)),
        parts, dweight, dbias, count, channels,
        TAPS=taps, ROWS=SUM_ROWS, BLOCK=SUM_COLUMNS, num_warps=WARPS,
    )  # fmt: skip
