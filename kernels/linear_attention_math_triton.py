"""What the kernels of `linear_attention` compute with: feature maps, rotations, exact products."""

import triton
import triton.language as tl

from .triton_math import INTERPRETED, PTX, exp2_approximate, sum_rows

EPSILON = tl.constexpr(1e-6)

# What changes from call to call, and is no reason to compile anew.
SCALARS = [
    "tokens",
    "per_split",
    "splits",
    "heads",
    "width",
    "reciprocal",
    "shift",
    "row_stride",
    "column_stride",
    "query_splits",
    "pieces",
]


@triton.jit
def exponential(x, EXACT: tl.constexpr):
    """exp(x), x finite. The hardware's exp2 of x log2(e) is off by |x| roundings: for float32
    inputs x is reduced to |r| <= ln(2) / 2 first, by an ln(2) in two parts."""
    if EXACT:
        whole = tl.floor(x * 1.4426950408889634 + 0.5)
        r = (x - whole * 0.693359375) + whole * 2.12194440e-4
        return tl.exp2(r * 1.4426950408889634) * tl.exp2(whole)
    else:
        return exp2_approximate(x * 1.4426950408889634)


@triton.jit
def absent(MAP: tl.constexpr):
    """What stands for a missing token or channel: phi of it is zero."""
    return 0.0 if MAP == "identity" else -1e4


@triton.jit
def feature(x, MAP: tl.constexpr, EXACT: tl.constexpr):
    if MAP == "elu_plus_one":
        if EXACT:
            return tl.where(x > 0, x + 1.0, exponential(tl.minimum(x, 0.0), EXACT))
        else:
            return tl.where(x > 0, x + 1.0, exponential(x, EXACT))
    elif MAP == "relu":
        return tl.maximum(x, 0.0)
    elif MAP == "exp":
        return exponential(x, EXACT)
    else:
        return x


@triton.jit
def feature_gradient(x, f, gradient, MAP: tl.constexpr):
    """The gradient of x from that of f = phi(x)."""
    if MAP == "elu_plus_one":
        return tl.where(x > 0, gradient, gradient * f)
    elif MAP == "relu":
        return tl.where(x > 0, gradient, 0.0)
    elif MAP == "exp":
        return gradient * f
    else:
        return gradient


@triton.jit
def readout_factors(n, scale, READOUT: tl.constexpr):
    """a(n), b(n) and their derivatives, of y = a R(f(q)) S + b mean(v)."""
    if READOUT == "normalized":
        a = 1.0 / (n + EPSILON)
        return a, n * 0.0, -a * a, n * 0.0
    elif READOUT == "magnitude_aware":
        inverse = 1.0 / (scale * n + EPSILON)
        return scale * (1.0 + inverse), -scale * n, -(scale * inverse) * (scale * inverse), -scale
    else:
        return n * 0.0 + scale, 1.0 - scale * n, n * 0.0, -scale


@triton.jit
def _load_four(pointers):
    """(tokens, groups) of pointers to the four floats behind each, (tokens, 4 groups).

    As assembly, so that it stays a load through the first-level cache, where the tables lie:
    the compiler's pipeline would fetch them anew from the second level for every tile.
    """
    T: tl.constexpr = pointers.shape[0]
    G: tl.constexpr = pointers.shape[1]
    a, b, c, d = tl.inline_asm_elementwise(
        "ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$4];",
        "=f,=f,=f,=f,l",
        [pointers],
        (tl.float32, tl.float32, tl.float32, tl.float32),
        True,
        1,
    )
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (T, 4 * G))


@triton.jit
def angles(
    rows, columns, n, last, width, reciprocal, shift, row_stride, column_stride,
    D: tl.constexpr, P: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Cosines and sines of the tokens `n`, (tokens, P / 2), from the separable tables.

    `ONCE`: they turn one tensor. What turns two, in the layouts of two products, would have
    `_load_four` convert them through shared memory.
    """
    quarter: tl.constexpr = D // 4
    vector: tl.constexpr = 4 if PTX and ONCE and D == P and quarter % 4 == 0 else 1
    i = tl.arange(0, P // (2 * vector))[None, :] * vector
    n = tl.minimum(n, last - 1)  # a tile reaches past the last token, the tables do not
    row = ((n.to(tl.int64) * reciprocal) >> shift).to(tl.int32)
    column = n - row * width
    in_rows = i < quarter
    pointers = tl.where(
        in_rows,
        rows + row[:, None] * quarter + i,
        columns + column[:, None] * quarter + (i - quarter),
    )
    sine = tl.where(in_rows, row_stride, column_stride)
    if vector == 1 and quarter % 4 == 0:
        # The compiler cannot see through `where` that four entries at a time are one load.
        pointers = tl.max_contiguous(tl.multiple_of(pointers, (1, 16)), (1, 4))
        sine = tl.max_constancy(tl.multiple_of(sine, (1, 4)), (1, 4))
    if vector == 4:
        return _load_four(pointers), _load_four(pointers + sine)
    elif D == P:
        return tl.load(pointers), tl.load(pointers + sine)
    else:
        ok = i < 2 * quarter
        return tl.load(pointers, mask=ok, other=0.0), tl.load(pointers + sine, mask=ok, other=0.0)


@triton.jit
def rotate(x, cosine, sine):
    """Turn neighbouring pairs of the last axis; the tables broadcast over nothing."""
    T: tl.constexpr = x.shape[0]
    P: tl.constexpr = x.shape[1]
    a, b = tl.split(tl.reshape(x, (T, P // 2, 2)))
    return tl.reshape(tl.join(a * cosine - b * sine, b * cosine + a * sine), (T, P))


@triton.jit
def _cut(x):
    """The upper 16 bits of float32: bfloat16 rounded towards zero, at one instruction."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def high(x, IEEE: tl.constexpr):
    if IEEE:
        return x.to(tl.float32)
    else:
        return _cut(x).to(tl.bfloat16)


@triton.jit
def low(x, IEEE: tl.constexpr):
    """What `_high` leaves off: x = high + low to 16 bits."""
    if IEEE:
        return x
    else:
        return (x - _cut(x)).to(tl.bfloat16)


@triton.jit
def _multiply(a, b, accumulator):
    if INTERPRETED:  # it would multiply the bit patterns of bfloat16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator)


@triton.jit
def dot(a, b, accumulator, IEEE: tl.constexpr):
    """accumulator + a @ b, on the tensor cores unless `IEEE`.

    One rounding of phi and S to bfloat16 would be amplified where a readout subtracts nearly
    equal terms. So a float32 operand is split into high + low, 16 bits together, and only the
    product of two lows is left out; an operand that comes as bfloat16 is exact.
    """
    if IEEE:
        return tl.dot(a, b, accumulator, input_precision="ieee")
    elif b.dtype == tl.bfloat16:
        accumulator = _multiply(high(a, False), b, accumulator)
        return _multiply(low(a, False), b, accumulator)
    else:
        return dot_halves(a, high(b, False), low(b, False), accumulator, False)


@triton.jit
def dot_halves(a, b_high, b_low, accumulator, IEEE: tl.constexpr):
    """`_dot` with a `b` that is split already."""
    if IEEE:
        return tl.dot(a, b_high, accumulator, input_precision="ieee")
    elif a.dtype == tl.bfloat16:
        accumulator = _multiply(a, b_high, accumulator)
        return _multiply(a, b_low, accumulator)
    else:
        a_high = high(a, False)
        accumulator = _multiply(a_high, b_high, accumulator)
        accumulator = _multiply(a_high, b_low, accumulator)
        return _multiply(low(a, False), b_high, accumulator)


@triton.jit
def operand(x, IEEE: tl.constexpr):
    """A loaded tensor as an operand of `_dot`: bfloat16 stays as it is, exact."""
    if IEEE or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def fold(x, ROWS: tl.constexpr):
    """(T, P) to (ROWS, P), by sums over rows that one thread holds: registers, no exchange."""
    T: tl.constexpr = x.shape[0]
    return tl.sum(tl.reshape(x, (T // ROWS, ROWS, x.shape[1])), 0)


@triton.jit
def fold_accumulated(x):
    """`_fold` for the tensor cores' layout of sums, where a thread holds rows 8 apart."""
    T: tl.constexpr = x.shape[0]
    P: tl.constexpr = x.shape[1]
    return tl.reshape(tl.sum(tl.reshape(x, (T // 16, 2, 8, P)), 1), (T // 2, P))


@triton.jit
def sum_splits(parts, count, P: tl.constexpr):
    """Sum of `count` rows of P floats, in a fixed order."""
    column = tl.arange(0, P)
    return sum_rows(parts, count, P, column, column < P, 4096 // P, P)
