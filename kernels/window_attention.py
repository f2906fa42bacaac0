"""Attention within the windows of a map: shifted windows (Swin), cross-shaped ones (CSwin)."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Operator, rows_contiguous, runs_triton, without_autocast

Padding = Literal["end", "end_after_shift", "centre"]

MASK = -100.0
WIDEST_TRITON_HEAD = 64
TRITON_KERNELS = (3, 5)


def largest_tile(projection: Tensor, heads: int, table: Tensor | None) -> int:
    """The most tokens of a window that is one tile of a kernel: its scores stay in registers.

    A larger window is streamed, tile by tile, and leaves the logarithms of its softmax's sums
    for the backward pass.
    """
    wide = projection.shape[-1] > 3 * heads * 64
    if projection.dtype == torch.float32:
        return 32 if wide else 64
    return 128 if table is None and not wide else 64


def relative_positions(window: tuple[int, int], table: Tensor) -> Tensor:
    """Rows of `table` (R, S, heads), flattened to (R S, heads), for all pairs of a window's tokens.

    The row of query minus key, (dy, dx), is (dy + R // 2) S + dx + S // 2.
    """
    token = torch.arange(window[0] * window[1], device=table.device)
    y, x = token // window[1], token % window[1]
    dy, dx = (i[:, None] - i[None, :] for i in (y, x))
    return (dy + table.shape[0] // 2) * table.shape[1] + dx + table.shape[1] // 2


def _regions(length: int, shift: int, device: torch.device) -> Tensor:
    """Along one axis of the shifted map: which of the parts that the shift brought together."""
    place = torch.arange(length, device=device)
    return (place >= length - shift).long() if shift else torch.zeros_like(place)


def reference(
    projection: Tensor,
    table: Tensor | None,
    fill: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    heads: int,
    windows: Sequence[tuple[int, int]],
    shift: tuple[int, int],
    padding: Padding,
) -> Tensor:
    """Pad, roll, partition, attend, and back again; see `window_attention`."""
    dtype = projection.dtype
    wide = torch.promote_types(dtype, torch.float32)
    with without_autocast(projection):
        parts = projection.to(wide).unflatten(-1, (3, len(windows), -1)).unbind(4)
        table, fill, weight, bias = (
            None if x is None else x.to(wide) for x in (table, fill, weight, bias)
        )
        fills, weights, biases = (
            [None] * len(windows) if x is None else split(x)
            for x, split in (
                (fill, lambda x: x.unflatten(0, (3, len(windows), -1)).unbind(1)),
                (weight, lambda x: x.chunk(len(windows))),
                (bias, lambda x: x.chunk(len(windows))),
            )
        )
        y = [
            _one_window(x, table, f, w, b, heads // len(windows), window, shift, padding)
            for x, f, w, b, window in zip(parts, fills, weights, biases, windows, strict=True)
        ]
    return torch.cat(y, -1).to(dtype)


def _one_window(x, table, fill, weight, bias, heads, window, shift, padding):
    """`reference` for one size of windows; x is (B, H, W, 3, C), fill (3, C)."""
    batch, height, width, _, channels = x.shape
    (rows, columns), (wh, ww) = ((-(-height // window[0]), -(-width // window[1])), window)
    extra = rows * wh - height, columns * ww - width
    top, left = (side // 2 if padding == "centre" else 0 for side in extra)
    sides = (0, 0, 0, 0, left, extra[1] - left, top, extra[0] - top)
    back = (shift[0], shift[1])
    rolled = any(shift)

    def pad(x: Tensor) -> Tensor:
        y = F.pad(x, sides)
        if fill is not None:
            outside = 1 - F.pad(x.new_ones(height, width, 1, 1), sides)
            y = y + outside * fill
        return y

    def roll(x: Tensor) -> Tensor:
        return x.roll((-shift[0], -shift[1]), (1, 2)) if rolled else x

    x = pad(roll(x)) if padding == "end_after_shift" else roll(pad(x))
    # (3, B, rows, columns, heads, wh * ww, D)
    x = x.reshape(batch, rows, wh, columns, ww, 3, heads, channels // heads)
    query, key, value = x.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).unbind(0)
    scores = query @ key.transpose(-2, -1) * (channels // heads) ** -0.5
    if table is not None:
        index = relative_positions(window, table)
        scores = scores + table.flatten(0, 1)[index].permute(2, 0, 1)
    if rolled:
        y = _regions(rows * wh, shift[0], x.device).view(rows, 1, wh, 1)
        z = _regions(columns * ww, shift[1], x.device).view(1, columns, 1, ww)
        region = (2 * y + z).reshape(rows, columns, 1, wh * ww)
        apart = region[..., :, None] != region[..., None, :]
        scores = scores + MASK * apart.to(scores.dtype)
    y = scores.softmax(-1) @ value
    y = y.unflatten(-2, (wh, ww))  # (B, rows, columns, heads, wh, ww, D)
    if weight is not None:
        maps = value.unflatten(-2, (wh, ww)).permute(0, 1, 2, 3, 6, 4, 5)
        local = F.conv2d(
            maps.reshape(-1, channels, wh, ww),
            weight,
            bias,
            padding=weight.shape[-1] // 2,
            groups=channels,
        )
        y = y + local.reshape(maps.shape).permute(0, 1, 2, 3, 5, 6, 4)
    y = y.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, rows * wh, columns * ww, channels)
    if padding == "end_after_shift":
        y = y[:, :height, :width]
    if rolled:
        y = y.roll(back, (1, 2))
    return y[:, top : top + height, left : left + width]


def window_attention(
    projection: Tensor,
    *,
    heads: int,
    windows: Sequence[tuple[int, int]],
    shift: tuple[int, int] = (0, 0),
    padding: Padding = "end",
    table: Tensor | None = None,
    fill: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(D^-0.5 q k^T + table + mask) v within every window of a map.

    The shifted windows of Swin (arXiv:2103.14030, eqs. 3 and 4) with one size of windows, the
    cross-shaped ones of CSwin (arXiv:2107.00652, eq. 5 to 7) with two: (H, s) and (s, W).

    Args:
        projection: (B, H, W, 3 C), the channel blocks q, k, v, each of `heads` heads of width
            D; any strides with the last axis contiguous. On CUDA, float64 and heads wider than
            64 run the reference.
        heads: number of heads, a multiple of len(windows); C is a multiple of it.
        windows: sizes (rows, columns) in tokens; the heads are shared out to them equally, in
            this order.
        shift: (rows, columns) by which the map is rolled before it is cut into windows, and
            back after it. Tokens of a window that the roll has brought together from opposite
            borders see each other with -100 added to their scores.
        padding: where a map that is no multiple of a window is padded: 'end' at its bottom and
            right, before it is rolled (Microsoft's Swin); 'end_after_shift' there too, but
            after (timm's Swin); 'centre' at all four sides (Microsoft's CSwin).
        table: (R, S, heads) relative position bias, R and S odd and at least 2 w - 1: the row
            of query minus key, from its centre. Needs one size of windows.
        fill: (3 C,) the q, k and v of a padded token, which the others see: a map padded with
            zeros before its projection has the projection's bias there. Zero for none.
        weight, bias: (C, 1, k, k) and (C,) of a depthwise convolution of v, zero-padded at the
            borders of each window, that is added to the result (CSwin's locally enhanced
            position encoding). On CUDA a k of 3 or 5 runs the Triton kernel.

    Returns:
        (B, H, W, C) contiguous, in the dtype of `projection`; sums are in float32 or wider.

    Raises:
        ValueError: if shapes disagree or an option is out of range.
    """
    windows = [tuple(window) for window in windows]
    _check(projection, heads, windows, shift, padding, table, fill, weight)
    head_dim = projection.shape[-1] // (3 * heads)
    if (
        head_dim > WIDEST_TRITON_HEAD
        or (weight is not None and weight.shape[-1] not in TRITON_KERNELS)
        or not runs_triton(projection)
    ):
        return reference(
            projection, table, fill, weight, bias, heads, windows, shift, padding
        ).contiguous()
    sizes = [side for window in windows for side in window]
    return _forward(projection, table, fill, weight, bias, heads, sizes, list(shift), padding)[0]


def _check(projection, heads, windows, shift, padding, table, fill, weight) -> None:
    if projection.ndim != 4 or projection.shape[-1] % (3 * heads):
        raise ValueError(
            f"projection has shape {tuple(projection.shape)}, expected (B, H, W, 3 C) with C a "
            f"multiple of heads = {heads}"
        )
    if not windows or heads % len(windows):
        raise ValueError(f"heads is {heads}, expected a multiple of the {len(windows)} windows")
    if any(h < 1 or w < 1 for h, w in windows):
        raise ValueError(f"windows are {windows}, expected sides of at least 1")
    if padding not in get_args(Padding):
        raise ValueError(
            f"padding is {padding!r}, expected one of {', '.join(map(repr, get_args(Padding)))}"
        )
    if (any(shift) or table is not None) and len(windows) > 1:
        raise ValueError("shift and table need one size of windows, got " + str(windows))
    if any(not 0 <= s < side for s, side in zip(shift, windows[0], strict=True)):
        raise ValueError(f"shift is {tuple(shift)}, expected 0 to less than {windows[0]}")
    channels = projection.shape[-1] // 3
    if table is not None:
        rows, columns = (2 * side - 1 for side in windows[0])
        if (
            table.ndim != 3
            or table.shape[2] != heads
            or table.shape[0] < rows
            or table.shape[1] < columns
            or table.shape[0] % 2 == 0
            or table.shape[1] % 2 == 0
        ):
            raise ValueError(
                f"table has shape {tuple(table.shape)}, expected odd sides of at least "
                f"({rows}, {columns}) and {heads} heads"
            )
    if fill is not None and fill.shape != (3 * channels,):
        raise ValueError(f"fill has shape {tuple(fill.shape)}, expected ({3 * channels},)")
    if weight is not None and (
        weight.shape != (channels, 1, weight.shape[-1], weight.shape[-1])
        or weight.shape[-1] % 2 == 0
    ):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected ({channels}, 1, k, k) with odd k"
        )


# The Triton side. Triton itself is imported at the first launch, not before.


def _run(projection, table, fill, weight, bias, heads, windows, shift, padding):
    from . import window_attention_triton as kernels

    projection = rows_contiguous(projection)
    out, sums = _run_fake(projection, table, fill, weight, bias, heads, windows, shift, padding)
    table, fill, weight, bias = (
        None if x is None else x.contiguous() for x in (table, fill, weight, bias)
    )
    problem = kernels.Problem(projection, table, fill, weight, heads, windows, shift, padding)
    kernels.forward(problem, projection, table, fill, weight, bias, out, sums)
    return out, sums


def _run_fake(projection, table, fill, weight, bias, heads, windows, shift, padding):
    batch, height, width, channels = projection.shape
    sizes = list(zip(windows[::2], windows[1::2], strict=True))
    limit = largest_tile(projection, heads, table)
    size = 0
    for wh, ww in sizes:
        if wh * ww > limit:
            tokens = -(-height // wh) * -(-width // ww) * wh * ww
            size = size + batch * tokens * (heads // len(sizes))
    return (
        projection.new_empty(batch, height, width, channels // 3),
        projection.new_empty(size, dtype=torch.float32),
    )


def _run_backward(
    grad, projection, table, fill, weight, bias, sums, heads, windows, shift, padding
):
    from . import window_attention_triton as kernels

    grad = rows_contiguous(grad)
    projection = rows_contiguous(projection)
    table, fill, weight, bias = (
        None if x is None else x.contiguous() for x in (table, fill, weight, bias)
    )
    dprojection = torch.empty(projection.shape, dtype=projection.dtype, device=projection.device)
    problem = kernels.Problem(projection, table, fill, weight, heads, windows, shift, padding)
    gradients = kernels.backward(problem, grad, projection, table, fill, weight, sums, dprojection)
    # An operator returns a fixed number of tensors: an empty one stands for none.
    return dprojection, *(
        projection.new_empty(0) if x is None else gradient.to(x.dtype)
        for x, gradient in zip((table, fill, weight, bias), gradients, strict=True)
    )


def _run_backward_fake(
    grad, projection, table, fill, weight, bias, sums, heads, windows, shift, padding
):
    return projection.new_empty(projection.shape), *(
        projection.new_empty(0) if x is None else x.new_empty(x.shape)
        for x in (table, fill, weight, bias)
    )


def _save(ctx, inputs, output):
    *tensors, ctx.heads, ctx.windows, ctx.shift, ctx.padding = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * 9
    gradients = _backward(grad, *ctx.saved_tensors, ctx.heads, ctx.windows, ctx.shift, ctx.padding)
    kept = (
        None if x is None else gradient
        for x, gradient in zip(ctx.saved_tensors[:5], gradients, strict=True)
    )
    return *kept, None, None, None, None


_forward = Operator(
    "window_attention(Tensor projection, Tensor? table, Tensor? fill, Tensor? weight, "
    "Tensor? bias, int heads, SymInt[] windows, SymInt[] shift, str padding) -> (Tensor, Tensor)",
    _run,
    _run_fake,
    _save,
    _differentiate,
)
_backward = Operator(
    "window_attention_backward(Tensor grad, Tensor projection, Tensor? table, Tensor? fill, "
    "Tensor? weight, Tensor? bias, Tensor sums, int heads, SymInt[] windows, SymInt[] shift, "
    "str padding) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _run_backward_fake,
)
