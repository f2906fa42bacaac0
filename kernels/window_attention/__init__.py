"""Attention within the windows of a map: shifted windows (Swin), cross-shaped ones (CSwin)."""

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from ..runtime.dispatch import runs_triton
from . import operator, reference

Padding = Literal["end", "end_after_shift", "centre"]
# The widest head and the sides of the local branch that the kernels take.
WIDEST_TRITON_HEAD = 64
TRITON_KERNELS = (3, 5)


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
    attn_drop: nn.Module | None = None,
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
            zeros before its projection has the projection's bias there. None stands for zero.
        weight, bias: (C, 1, k, k) and (C,) of a depthwise convolution of v, zero-padded at the
            borders of each window, that is added to the result (CSwin's locally enhanced
            position encoding). On CUDA a k of 3 or 5 runs the Triton kernel.
        attn_drop: a module that gets each attention map (B windows, heads, tokens, tokens) and
            returns what takes its place; the reference then runs.

    Returns:
        (B, H, W, C) contiguous, in the dtype of `projection`; sums are in float32 or wider.

    Raises:
        ValueError: if shapes disagree or an option is out of range.
    """
    windows = [(height, width) for height, width in windows]
    _check(projection, heads, windows, shift, padding, table, fill, weight)
    head_dim = projection.shape[-1] // (3 * heads)
    if (
        head_dim > WIDEST_TRITON_HEAD
        or attn_drop is not None
        or (weight is not None and weight.shape[-1] not in TRITON_KERNELS)
        or not runs_triton(projection)
    ):
        return reference.window_attention(
            projection, table, fill, weight, bias, heads, windows, shift, padding, attn_drop
        ).contiguous()
    sizes = tuple(side for window in windows for side in window)
    return operator.window_attention(
        projection, table, fill, weight, bias, heads, sizes, tuple(shift), padding
    )[0]


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
