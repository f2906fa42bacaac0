"""What the kernels of `mixed_state_attention` compute with: places of tokens, features, mixing."""

import triton
import triton.language as tl

from ..runtime.mathematics import dot, multiply

EPSILON = tl.constexpr(1e-6)

# Sizes that change from call to call and do not need other machine code.
SCALARS = [
    "tokens",
    "heads",
    "height",
    "width",
    "rows",
    "columns",
    "by_width",
    "by_rows",
    "by_columns",
    "tiles",
]


@triton.jit
def divide(n, reciprocal):
    """n // d by the `reciprocal` of d, exactly where n d < 2^30; see `plan.py`."""
    return ((n.to(tl.int64) * reciprocal) >> 30).to(tl.int32)


@triton.jit
def token_of(square, place, height, width, rows, columns, by_columns, SQUARES: tl.constexpr):
    """The token at a place of a square of rows x columns, and whether it is there."""
    inner = divide(place, by_columns)
    row = square // SQUARES * rows + inner
    column = square % SQUARES * columns + (place - inner * columns)
    here = (square < SQUARES * SQUARES) & (inner < rows) & (row < height) & (column < width)
    return row * width + column, here


@triton.jit
def square_of(n, tokens, width, by_width, by_rows, by_columns, SQUARES: tl.constexpr):
    """The square of the tokens `n`; -1 of those beyond the last."""
    row = divide(n, by_width)
    square = divide(row, by_rows) * SQUARES + divide(n - row * width, by_columns)
    return tl.where(n < tokens, square, -1)


@triton.jit
def feature(x):
    """phi(x) as an operand: of bfloat16 rounded to it, which 1e-6 alone feels, else in float32."""
    f = tl.maximum(x.to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL) + EPSILON
    if x.dtype == tl.bfloat16:
        return f.to(tl.bfloat16)
    else:
        return f


@triton.jit
def feature_where(x, here):
    """`feature`, and zero elsewhere than `here`."""
    f = feature(x)
    return tl.where(here, f, tl.zeros_like(f))


@triton.jit
def one_hot(square, LANES: tl.constexpr, EXACT: tl.constexpr):
    """(LANES, tokens): 1 where a token lies in that square, to gather and sum by products."""
    hot = tl.where(square[None, :] == tl.arange(0, LANES)[:, None], 1.0, 0.0)
    return hot if EXACT else hot.to(tl.bfloat16)


@triton.jit
def weights_of(rows, hot, EXACT: tl.constexpr):
    """Column by column of `hot` the entry of `rows` (tokens, LANES) that it points at."""
    return dot(rows, hot, tl.zeros((rows.shape[0], hot.shape[1]), tl.float32), EXACT)


@triton.jit
def load_mixing(mixing, first, second, SQUARES: tl.constexpr):
    """The entries A[first, second], zero beyond the last square."""
    M: tl.constexpr = SQUARES * SQUARES
    ok = (first >= 0) & (first < M) & (second >= 0) & (second < M)
    return tl.load(mixing + first * M + second, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def by_place(x, LANES: tl.constexpr):
    """(tokens,) of a tile that has all squares, place by place, as (places, LANES)."""
    return tl.reshape(x, (x.shape[0] // LANES, LANES))


@triton.jit
def mix(x, matrix):
    """The sums over the squares j of matrix[i, j] x[j], at each place of a tile of all squares."""
    LANES: tl.constexpr = matrix.shape[0]
    mixed = tl.sum(by_place(x, LANES)[:, None, :] * matrix[None, :, :], 2)
    return tl.reshape(mixed, (x.shape[0],))


@triton.jit
def accumulate(total, a, b, EXACT: tl.constexpr):
    """total + a @ b; in float32 the product of a tile is summed first, so that equal terms, such as
    padding tokens give, do not drift."""
    if EXACT:
        # The compiler would make the operand of a mere sum the product's accumulator.
        return tl.fma(total, tl.full(total.shape, 1.0, tl.float32), multiply(a, b))
    elif a.dtype == tl.bfloat16 and b.dtype == tl.bfloat16:
        return multiply(a, b, total)
    else:
        return dot(a, b, total, False)
