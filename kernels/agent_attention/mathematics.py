"""What the kernels of `agent_attention` compute with: scores, softmax, tables, convolution."""

import triton
import triton.language as tl

from ..runtime.mathematics import exponential, multiply

# Scores, and differences of scores, of agents and tokens that do not exist: their exponential is
# zero.
NEVER = tl.constexpr(-1e30)
VANISHED = tl.constexpr(-1e4)

# Sizes that change from call to call and do not need other machine code.
SCALARS = [
    "tokens",
    "per_split",
    "heads",
    "height",
    "width",
    "prefix",
    "batch",
    "per_chunk",
    "splits",
    "down",
    "right",
]


@triton.jit
def softmax_weights(scores, maximum, valid, EXACT: tl.constexpr):
    """exp(scores - maximum), zero where `valid` is false."""
    return exponential(tl.where(valid, scores - maximum, VANISHED), EXACT)


@triton.jit
def scores_of(x, y, bias, scale):
    """scale x y^T + bias."""
    return multiply(x, tl.trans(y)) * scale + bias.to(tl.float32)


@triton.jit
def softmax_of(scores, valid, EXACT: tl.constexpr):
    """Softmax over the last axis."""
    scores = tl.where(valid, scores, NEVER)
    p = softmax_weights(scores, tl.max(scores, 1)[:, None], valid, EXACT)
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def agent_rows(pointer, i, count, D: tl.constexpr, P: tl.constexpr):
    """Rows `i` of a contiguous (count, D), zero from row `count` on."""
    d = tl.arange(0, P)[None, :]
    return tl.load(pointer + i[:, None] * D + d, mask=(i < count)[:, None] & (d < D), other=0.0)


@triton.jit
def bias_tile(bias, i, n, bias_a, COUNT: tl.constexpr):
    """A head's bias of agents `i` and tokens `n`, which broadcast against each other.

    Its rows are padded with zeros to a multiple of 16, so that eight entries are one load.
    """
    mask = (i < COUNT) & (n < bias_a)
    return tl.load(bias + i.to(tl.int64) * bias_a + n, mask=mask, other=0.0)


@triton.jit
def convolve(
    x, x_n, weight, channel, n, last, prefix, height, width,
    D: tl.constexpr, P: tl.constexpr, K: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """The depthwise convolution of the map that starts at row `prefix` of x, at tokens `n`."""
    d = tl.arange(0, P)
    live = d < D
    row = (n - prefix) // width
    column = (n - prefix) - row * width
    mapped = (n >= prefix) & (n < last)
    total = tl.zeros((n.shape[0], P), tl.float32)
    # A loop goes over the rows, so that registers hold the weights of one row at a time.
    for i in range(0, K):
        r = row + i - K // 2
        at = (n + (i - K // 2) * width).to(tl.int64)
        in_row = mapped & (r >= 0) & (r < height)
        for j in tl.static_range(K):
            c = column + (j - K // 2)
            ok = in_row & (c >= 0) & (c < width)
            pointers = x + (at + (j - K // 2))[:, None] * x_n + d[None, :]
            tile = tl.load(pointers, mask=ok[:, None] & live[None, :], other=0.0)
            tap = K * K - 1 - i * K - j if BACKWARD else i * K + j
            factor = tl.load(weight + (channel + d) * (K * K) + tap, mask=live, other=0.0)
            total += tile.to(tl.float32) * factor.to(tl.float32)[None, :]
    return total
