"""The reference of `window_attention`, in plain PyTorch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.dispatch import without_autocast

# Added to the scores of tokens that only the roll brought together, as Swin does.
MASK = -100.0


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


def window_attention(
    projection: Tensor,
    table: Tensor | None,
    fill: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    heads: int,
    windows: Sequence[tuple[int, int]],
    shift: tuple[int, int],
    padding: str,
    attn_drop: nn.Module | None = None,
) -> Tensor:
    """Pad, roll, partition, attend, and back again; see the public function."""
    dtype = projection.dtype
    wide = torch.promote_types(dtype, torch.float32)
    with without_autocast(projection):
        table, fill, weight, bias = (
            None if x is None else x.to(wide) for x in (table, fill, weight, bias)
        )
        parts, fills, weights, biases = (
            [None] * len(windows) if x is None else split(x, len(windows))
            for x, split in (
                (projection.to(wide), _split_projection),
                (fill, _split_projection),
                (weight, torch.chunk),
                (bias, torch.chunk),
            )
        )
        y = [
            _one_window(x, table, f, w, b, heads // len(windows), window, shift, padding, attn_drop)
            for x, f, w, b, window in zip(parts, fills, weights, biases, windows, strict=True)
        ]
    return torch.cat(y, -1).to(dtype)


def _split_projection(x: Tensor, count: int) -> list[Tensor]:
    """Of queries, keys and values (..., 3 C), as many parts (..., 3 C / count)."""
    if count == 1:
        return [x]
    parts = x.unflatten(-1, (3 * count, -1))
    return [parts[..., i::count, :].flatten(-2) for i in range(count)]


def _one_window(x, table, fill, weight, bias, heads, window, shift, padding, attn_drop):
    """`window_attention` for one size of windows; x is (B, H, W, 3 C), fill (3 C).

    Tensors have five dimensions at most: CoreML and ExecuTorch's XNNPACK have no others, and
    OpenVINO scales products of larger ones wrongly.
    """
    batch, height, width, channels = x.shape
    channels = channels // 3
    (rows, columns), (wh, ww) = ((-(-height // window[0]), -(-width // window[1])), window)
    extra = rows * wh - height, columns * ww - width
    top, left = (side // 2 if padding == "centre" else 0 for side in extra)
    sides = (0, 0, left, extra[1] - left, top, extra[0] - top)
    back = (shift[0], shift[1])
    # Comparing sizes that an exported graph leaves open would specialise it.
    padded = any(not isinstance(side, int) or side for side in extra)
    rolled = any(shift)

    def pad(x: Tensor) -> Tensor:
        y = F.pad(x, sides)
        if fill is not None:
            inside = torch.ones((height, width, 1), dtype=x.dtype, device=x.device)
            outside = 1 - F.pad(inside, sides)
            y = y + outside * fill
        return y

    def roll(x: Tensor) -> Tensor:
        return x.roll((-shift[0], -shift[1]), (1, 2)) if rolled else x

    x = pad(roll(x)) if padding == "end_after_shift" else roll(pad(x))
    x = x.reshape(batch, rows, wh, columns, 3 * ww * channels).transpose(2, 3)
    x = x.reshape(-1, wh * ww, 3, heads, channels // heads)
    # each (B * rows * columns, heads, wh * ww, D)
    query, key, value = x.permute(2, 0, 3, 1, 4).unbind(0)
    scores = (channels // heads) ** -0.5 * query @ key.transpose(-2, -1)
    if table is not None:
        index = relative_positions(window, table)
        scores = scores + table.flatten(0, 1)[index].permute(2, 0, 1)
    if rolled:
        y = _regions(rows * wh, shift[0], x.device).view(rows, 1, wh, 1)
        z = _regions(columns * ww, shift[1], x.device).view(1, columns, 1, ww)
        region = (2 * y + z).reshape(rows * columns, 1, wh * ww)
        apart = region[..., :, None] != region[..., None, :]
        scores = scores.unflatten(0, (batch, rows * columns)) + MASK * apart.to(scores.dtype)
        scores = scores.flatten(0, 1)
    attention = scores.softmax(-1)
    if attn_drop is not None:
        attention = attn_drop(attention)
    y = attention @ value
    if weight is not None:
        maps = value.unflatten(-2, (wh, ww)).permute(0, 1, 4, 2, 3)
        local = F.conv2d(
            maps.reshape(-1, channels, wh, ww),
            weight,
            bias,
            padding=weight.shape[-1] // 2,
            groups=channels,
        )
        y = y + local.reshape(-1, heads, channels // heads, wh * ww).transpose(-2, -1)
    y = y.transpose(1, 2).reshape(batch, rows, columns, wh, ww * channels)
    y = y.transpose(2, 3).reshape(batch, rows * wh, columns * ww, channels)
    if padded and padding == "end_after_shift":
        y = y[:, :height, :width]
    if rolled:
        y = y.roll(back, (1, 2))
    # CoreML does not take a slice of everything.
    return y[:, top : top + height, left : left + width] if padded else y
