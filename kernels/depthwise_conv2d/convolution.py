# ruff: noqa: RUF005 -- Triton's compiler knows a tuple's sum, not its unpacking
"""The Triton kernels of `depthwise_conv2d` from a map to a map: convolution and input gradient."""

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from ..runtime.mathematics import activate, activation_gradient
from .plan import plan
from .reference import has_own_windows

# `channels` is not among them: as a multiple of 16 it lets two channels be one load.
SCALARS = [
    *("height", "width", "out_height", "out_width", "rows", "strips", "batch", "images", "step"),
    "dilation",
]


@triton.jit
def find_phase(height, width, first, dilation, DILATED: tl.constexpr):
    """Which program of its phase this one is, and the phase's first row and column, height, width.

    A phase has each `dilation`-th pixel of each `dilation`-th row. One that has no row `first`, at
    which the program begins, has no columns for it.
    """
    program = tl.program_id(0)
    if not DILATED:
        return program, 0, 0, height, width
    else:
        i = program // dilation % dilation
        j = program % dilation
        height = (height - i + (dilation - 1)) // dilation
        width = (width - j + (dilation - 1)) // dilation
        width = tl.where(first < height, width, 0)
        return program // (dilation * dilation), i, j, height, width


@triton.jit
def enter_phase(at, i, j, row_stride, column_stride, dilation, DILATED: tl.constexpr):
    """The address of a phase in a map that begins at `at`, and its strides."""
    if not DILATED:
        return at, row_stride, column_stride
    else:
        at += i.to(tl.int64) * row_stride + j * column_stride
        return at, dilation.to(tl.int64) * row_stride, dilation * column_stride


@triton.jit
def load_strip(at, step, w, live, width, KW: tl.constexpr, P: tl.constexpr):
    """A row of a strip of P columns from `w` with its margins, column by column; `at` is the first
    margin's."""
    row = ()
    for i in tl.static_range(P + KW - 1):
        ok = live & (w + (i - KW // 2) >= 0) & (w + (i - KW // 2) < width)
        row = row + (tl.load(at + i * step, mask=ok, other=0.0),)
    return row


@triton.jit(do_not_specialize=SCALARS)
def _convolve(
    x, weight, bias, scale, other, add, y,
    x_b, x_r, x_c, o_b, o_r, o_c, a_b, a_r, a_c, y_b, y_r, y_c,
    height, width, channels, rows, strips, step, dilation,
    KH: tl.constexpr, KW: tl.constexpr, P: tl.constexpr, LANES: tl.constexpr, BC: tl.constexpr,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    BRANCH: tl.constexpr, SCALE: tl.constexpr, RESULT: tl.constexpr, DILATED: tl.constexpr,
    BACKWARD: tl.constexpr, ADD: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Stride 1, on one phase of the map. Forward: y = r(conv(a(x)) + bias), where RESULT names r;
    with BRANCH the input is x + `other`, with SCALE x + `scale` * `other`. Backward: x is the
    gradient of the output, the window is turned round, and y is the gradient of `other`, the input
    before the activation; with ADD `add` is added. The window of an image is `step` floats behind
    that of the one before, or the same.
    """
    SLOPE: tl.constexpr = BACKWARD and (ACTIVATION == "gelu" or ACTIVATION == "relu")
    PAD: tl.constexpr = KH // 2
    SIDE: tl.constexpr = KW // 2
    b = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * rows
    program, up, left, height, width = find_phase(height, width, first, dilation, DILATED)
    x, x_r, x_c = enter_phase(x, up, left, x_r, x_c, dilation, DILATED)
    other, o_r, o_c = enter_phase(other, up, left, o_r, o_c, dilation, DILATED)
    add, a_r, a_c = enter_phase(add, up, left, a_r, a_c, dilation, DILATED)
    y, y_r, y_c = enter_phase(y, up, left, y_r, y_c, dilation, DILATED)
    lane = program * LANES + tl.arange(0, LANES)[:, None]
    c = (lane // strips) * BC + tl.arange(0, BC)[None, :]
    live = c < channels
    w = (lane % strips) * P
    last = tl.minimum(first + rows, height)
    # Rows of x above and below the map add nothing, and are left out.
    top = tl.maximum(first - PAD, 0)
    bottom = tl.minimum(last + PAD, height)
    x += b * x_b + top.to(tl.int64) * x_r + ((w - SIDE) * x_c + c)
    y += b * y_b + (top - PAD).to(tl.int64) * y_r + (w * y_c + c)
    weight += b * step
    if SLOPE:
        other += b * o_b + (top - PAD).to(tl.int64) * o_r + (w * o_c + c)
    if BRANCH:
        other += b * o_b + top.to(tl.int64) * o_r + ((w - SIDE) * o_c + c)
    if SCALE:
        factor = tl.load(scale + c, mask=live, other=0.0).to(tl.float32)
    if ADD:
        add += b * a_b + (top - PAD).to(tl.int64) * a_r + (w * a_c + c)

    taps = ()
    for i in tl.static_range(KH * KW):
        tap = tl.load(weight + c * (KH * KW) + i, mask=live, other=0.0).to(tl.float32)
        if RESIDUAL and i == KH * KW // 2:
            tap += 1.0
        taps = taps + (tap,)
    start = tl.zeros((LANES, BC), tl.float32)
    if BIAS:
        start += tl.load(bias + c, mask=live, other=0.0).to(tl.float32)
    sums = ()
    for _ in tl.static_range(P * KH):
        sums = sums + (start,)
    ahead = load_strip(x, x_c, w, live, width, KW, P)
    if BRANCH:
        branch_ahead = load_strip(other, o_c, w, live, width, KW, P)
    for row in range(top, bottom):
        done = row - PAD >= first
        factors = ()
        addends = ()
        for p in tl.static_range(P):
            ok = live & (w + p < width) & done
            if SLOPE:
                factors = factors + (tl.load(other + p * o_c, mask=ok, other=0.0),)
            if ADD:
                addends = addends + (tl.load(add + p * a_c, mask=ok, other=0.0),)
        window = ()
        for i in tl.static_range(P + KW - 1):
            value = ahead[i].to(tl.float32)
            if BRANCH:
                term = branch_ahead[i].to(tl.float32)
                if SCALE:
                    term *= factor
                value = (value + term).to(x.dtype.element_ty).to(tl.float32)
            if not BACKWARD:
                value = activate(value, ACTIVATION, EXACT)
            window = window + (value,)
        # The last row is loaded twice, which is cheaper than a condition at every load.
        x += tl.where(row + 1 < bottom, x_r, 0)
        ahead = load_strip(x, x_c, w, live, width, KW, P)
        if BRANCH:
            other += tl.where(row + 1 < bottom, o_r, 0)
            branch_ahead = load_strip(other, o_c, w, live, width, KW, P)
        fresh = ()
        for p in tl.static_range(P):
            for j in tl.static_range(KH):
                total = sums[p * KH + j]
                for i in tl.static_range(KW):
                    if BACKWARD:
                        total += taps[j * KW + (KW - 1 - i)] * window[p + i]
                    else:
                        total += taps[(KH - 1 - j) * KW + i] * window[p + i]
                fresh = fresh + (total,)
        sums = ()
        for p in tl.static_range(P):
            total = fresh[p * KH]
            if SLOPE:
                total = activation_gradient(total, factors[p].to(tl.float32), ACTIVATION, EXACT)
            if ADD:
                total += addends[p].to(tl.float32)
            total = activate(total, RESULT, EXACT)
            ok = live & (w + p < width) & done
            tl.store(y + p * y_c, total.to(y.dtype.element_ty), mask=ok)
            for j in tl.static_range(KH - 1):
                sums = sums + (fresh[p * KH + j + 1],)
            sums = sums + (start,)
        y += y_r
        if SLOPE:
            other += o_r
        if ADD:
            add += a_r
    # No further row of x completes the last rows of the map.
    for j in tl.static_range(PAD):
        ends = (bottom - PAD + j >= first) & (bottom - PAD + j < last)
        for p in tl.static_range(P):
            ok = live & (w + p < width) & ends
            total = sums[p * KH + j]
            if SLOPE:
                before = tl.load(other + p * o_c, mask=ok, other=0.0).to(tl.float32)
                total = activation_gradient(total, before, ACTIVATION, EXACT)
            if ADD:
                total += tl.load(add + p * a_c, mask=ok, other=0.0).to(tl.float32)
            total = activate(total, RESULT, EXACT)
            tl.store(y + p * y_c, total.to(y.dtype.element_ty), mask=ok)
        y += y_r
        if SLOPE:
            other += o_r
        if ADD:
            add += a_r


@triton.jit(do_not_specialize=SCALARS)
def _gather(
    x, weight, bias, pre, y,
    x_b, x_r, x_c, p_b, p_r, p_c, y_b, y_r, y_c,
    height, width, out_height, out_width, channels,
    KH: tl.constexpr, KW: tl.constexpr, BLOCK: tl.constexpr, BC: tl.constexpr,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, RESULT: tl.constexpr,
    BACKWARD: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Stride 2, tap by tap; the map of `x` is height x width, that of `y` out_height x out_width.

    Backward as in `_convolve`: an output pixel gathers the taps that fall on even places.
    """
    PAD: tl.constexpr = KH // 2
    SIDE: tl.constexpr = KW // 2
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
    for tap in tl.static_range(KH * KW):
        if BACKWARD:
            r = row + (PAD - tap // KW)
            s = column + (SIDE - tap % KW)
            ok = valid & (r % 2 == 0) & (s % 2 == 0)
            r = r // 2
            s = s // 2
        else:
            r = row * 2 + (tap // KW - PAD)
            s = column * 2 + (tap % KW - SIDE)
            ok = valid
        ok = ok & (r >= 0) & (r < height) & (s >= 0) & (s < width)
        value = tl.load(x + r.to(tl.int64) * x_r + s * x_c + c, mask=ok, other=0.0).to(tl.float32)
        if not BACKWARD:
            value = activate(value, ACTIVATION, EXACT)
        factor = tl.load(weight + c * (KH * KW) + tap, mask=live, other=0.0).to(tl.float32)
        total += value * factor
    if BACKWARD:
        at = pre + b * p_b + row.to(tl.int64) * p_r + column * p_c + c
        before = tl.load(at, mask=valid, other=0.0).to(tl.float32)
        total = activation_gradient(total, before, ACTIVATION, EXACT)
    total = activate(total, RESULT, EXACT)
    at = y + b * y_b + row.to(tl.int64) * y_r + column * y_c + c
    tl.store(at, total.to(y.dtype.element_ty), mask=valid)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    activation: str | None,
    residual: bool,
    out: Tensor,
    dilation: int = 1,
    branch: Tensor | None = None,
    scale: Tensor | None = None,
    result_activation: str | None = None,
) -> None:
    """Write the convolution of `x`, at stride 1 of x + scale * branch if there is one, to `out`."""
    how = plan(
        x.shape, x.dtype, x.device, weight.shape[2:], stride, activation, bias is not None,
        residual, branch=branch is not None, scale=scale is not None,
        own=has_own_windows(x, weight), dilation=dilation, result_activation=result_activation,
    )  # fmt: skip
    biases = weight if bias is None else bias
    if stride == 1:
        other = x if branch is None else branch
        tensors = (x, weight, biases, weight if scale is None else scale, other, x, out)
        strides = ((0, 0, 0) if branch is None else branch.stride()[:3]) + (0, 0, 0)
        kernel = _convolve
    else:
        tensors, strides = (x, weight, biases, x, out), (0, 0, 0)
        kernel = _gather
    launch(kernel, how.forward, *tensors, *x.stride()[:3], *strides, *out.stride()[:3])


def input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    activation: str | None,
    residual: bool,
    out: Tensor,
    add: Tensor | None = None,
    dilation: int = 1,
) -> None:
    """Write the gradient of `x` to `out`, at stride 1 plus `add`, which may be `out`, or None."""
    how = plan(
        x.shape, x.dtype, x.device, weight.shape[2:], stride, activation,
        residual=residual, add=add is not None, own=has_own_windows(x, weight), dilation=dilation,
    )  # fmt: skip
    strides = (*grad.stride()[:3], *x.stride()[:3])
    if stride == 1:
        other_strides = (0, 0, 0) if add is None else add.stride()[:3]
        launch(
            _convolve, how.input_gradient,
            grad, weight, weight, weight, x, grad if add is None else add, out,
            *strides, *other_strides, *out.stride()[:3],
        )  # fmt: skip
    else:
        launch(
            _gather, how.input_gradient,
            grad, weight, weight, x, out, *strides, *out.stride()[:3],
        )  # fmt: skip
