"""The backward kernel of `window_pool`."""

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from .forward import SCALARS
from .plan import Share


@triton.jit
def _unfold(token, piece, side, squares, extent, dilation):
    """Square and step of a token's place in a piece of the folded strip, and whether it has one.

    Where two pieces meet they share a token, which is the former's.
    """
    last = side - 1
    is_back = piece % 2 == 1
    place = tl.where(is_back, (piece + 1) * last - token, piece * last + token)
    is_shared = (piece > 0) & (token == tl.where(is_back, last, 0))
    # A strip of one token is folded after each.
    place = tl.where(last == 0, piece, place)
    square = place // extent
    offset = place % extent
    ok = ((is_shared == 0) | (last == 0)) & (square < squares) & (offset % dilation == 0)
    return square, offset // dilation, ok


@triton.jit(do_not_specialize=SCALARS)
def _spread(
    grad, out, o_b, o_n,
    height, width, down, across, extent, dilation, window, heads, pieces_y, pieces_x,
    D: tl.constexpr, P: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The gradients of some tokens of one image, in the channels of one head."""
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    grad += (b * window * window * heads + h) * D
    out += b * o_b + h * D
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, P)[None, :]
    squares = down * across
    total = tl.zeros((TOKENS, P), tl.float32)
    for up in range(pieces_y):
        i, row, ok_y = _unfold(n // width, up, height, down, extent, dilation)
        for side in range(pieces_x):
            j, column, ok_x = _unfold(n % width, side, width, across, extent, dilation)
            ok = ok_y & ok_x & (n < height * width)
            # Few tokens of a dilated window's squares are read.
            if tl.max(ok.to(tl.int32), 0) > 0:
                average = ((i * across + j)[:, None] * D + d) // squares
                at = ((row * window + column) * heads)[:, None] * D + average
                slope = tl.load(grad + at, mask=ok[:, None] & (d < D), other=0.0)
                total += slope.to(tl.float32)
    total /= squares.to(tl.float32)
    at = n.to(tl.int64)[:, None] * o_n + d
    ok = (n < height * width)[:, None] & (d < D)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=ok)


def backward(how: tuple[Share, ...], grad: Tensor, out: Tensor) -> None:
    """Write the gradient of the map."""
    for share, slope in zip(how, grad, strict=True):
        part = out[..., share.channels]
        launch(_spread, share.spread, slope, part, part.stride(0), part.stride(2))
