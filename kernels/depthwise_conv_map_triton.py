# ruff: noqa: RUF005 -- Triton's compiler knows a tuple's sum, not its unpacking
"""The Triton kernels of `depthwise_conv2d` from a map to a map: convolution and input gradient."""

import triton
import triton.language as tl

from .triton_math import gelu, gelu_gradient

# Not `channels`: that it is a multiple of 16 is what lets two of them be one load.
SCALARS = ["height", "width", "out_height", "out_width", "rows", "groups"]


@triton.jit
def load_strip(at, step, w, live, width, K: tl.constexpr, P: tl.constexpr):
    """A row of a strip of P columns from `w` with its margins, column by column; `at` is the first
    margin's."""
    row = ()
    for i in tl.static_range(P + K - 1):
        ok = live & (w + (i - K // 2) >= 0) & (w + (i - K // 2) < width)
        row = row + (tl.load(at + i * step, mask=ok, other=0.0),)
    return row


@triton.jit(do_not_specialize=SCALARS)
def _convolve(
    x, weight, bias, other, add, y,
    x_b, x_r, x_c, o_b, o_r, o_c, a_b, a_r, a_c, y_b, y_r, y_c,
    height, width, channels, rows, groups,
    K: tl.constexpr, P: tl.constexpr, STRIPS: tl.constexpr, BC: tl.constexpr,
    GELU: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BRANCH: tl.constexpr,
    BACKWARD: tl.constexpr, ADD: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Stride 1. Forward: y = conv(a(x)) + bias; with BRANCH the input is x + `other`, and with ADD
    that sum is kept in `add`. Backward: x is the gradient of the output, the window is turned
    round, and y is the gradient of `other`, the input before the activation, with ADD plus `add`.
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
        other += b * o_b + (top - PAD).to(tl.int64) * o_r + (w * o_c + c)
    if BRANCH:
        other += b * o_b + top.to(tl.int64) * o_r + ((w - PAD) * o_c + c)
    if ADD:
        a_row = top - PAD if BACKWARD else top
        add += b * a_b + a_row.to(tl.int64) * a_r + (w * a_c + c)

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
    ahead = load_strip(x, x_c, w, live, width, K, P)
    if BRANCH:
        terms_ahead = load_strip(other, o_c, w, live, width, K, P)
    for row in range(top, bottom):
        done = row - PAD >= first
        factors = ()
        addends = ()
        for p in tl.static_range(P):
            ok = live & (w + p < width) & done
            if BACKWARD and GELU:
                factors = factors + (tl.load(other + p * o_c, mask=ok, other=0.0),)
            if BACKWARD and ADD:
                addends = addends + (tl.load(add + p * a_c, mask=ok, other=0.0),)
        window = ()
        for i in tl.static_range(P + K - 1):
            value = ahead[i].to(tl.float32)
            if BRANCH:
                total = (value + terms_ahead[i].to(tl.float32)).to(x.dtype.element_ty)
                if ADD and (i >= PAD and i < PAD + P):
                    ok = live & (w + (i - PAD) < width) & (row >= first) & (row < last)
                    tl.store(add + (i - PAD) * a_c, total, mask=ok)
                value = total.to(tl.float32)
            if GELU and not BACKWARD:
                value = gelu(value, EXACT)
            window = window + (value,)
        # The last row is loaded twice: cheaper than to ask at every load.
        x += tl.where(row + 1 < bottom, x_r, 0)
        ahead = load_strip(x, x_c, w, live, width, K, P)
        if BRANCH:
            other += tl.where(row + 1 < bottom, o_r, 0)
            terms_ahead = load_strip(other, o_c, w, live, width, K, P)
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
                total *= gelu_gradient(factors[p].to(tl.float32), EXACT)
            if BACKWARD and ADD:
                total += addends[p].to(tl.float32)
            ok = live & (w + p < width) & done
            tl.store(y + p * y_c, total.to(y.dtype.element_ty), mask=ok)
            for j in tl.static_range(K - 1):
                sums = sums + (fresh[p * K + j + 1],)
            sums = sums + (start,)
        y += y_r
        if BACKWARD and GELU:
            other += o_r
        if ADD:
            add += a_r
    # The map's last rows, which no further row of x completes.
    for j in tl.static_range(PAD):
        ends = (bottom - PAD + j >= first) & (bottom - PAD + j < last)
        for p in tl.static_range(P):
            ok = live & (w + p < width) & ends
            total = sums[p * K + j]
            if BACKWARD and GELU:
                at = other + p * o_c
                total *= gelu_gradient(tl.load(at, mask=ok, other=0.0).to(tl.float32), EXACT)
            if BACKWARD and ADD:
                total += tl.load(add + p * a_c, mask=ok, other=0.0).to(tl.float32)
            tl.store(y + p * y_c, total.to(y.dtype.element_ty), mask=ok)
        y += y_r
        if BACKWARD and GELU:
            other += o_r
        if BACKWARD and ADD:
            add += a_r


@triton.jit(do_not_specialize=SCALARS)
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
            value = gelu(value, EXACT)
        factor = tl.load(weight + c * (K * K) + tap, mask=live, other=0.0).to(tl.float32)
        total += value * factor
    if BACKWARD and GELU:
        at = pre + b * p_b + row.to(tl.int64) * p_r + column * p_c + c
        total *= gelu_gradient(tl.load(at, mask=valid, other=0.0).to(tl.float32), EXACT)
    at = y + b * y_b + row.to(tl.int64) * y_r + column * y_c + c
    tl.store(at, total.to(y.dtype.element_ty), mask=valid)
