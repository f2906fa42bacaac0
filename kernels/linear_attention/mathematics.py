"""What the kernels of `linear_attention` compute with: feature maps, readouts, rotations."""

import triton
import triton.language as tl

from ..runtime.mathematics import (
    PTX,
    dot_halves,
    exp2_approximate,
    exponential,
    log2_approximate,
    logarithm,
    sum_rows,
)

EPSILON = tl.constexpr(1e-6)
FLOOR = tl.constexpr(100.0)

# Sizes that change from call to call and do not need other machine code.
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
def absent_value(MAP: tl.constexpr):
    """The value of a missing token or channel, whose phi is zero."""
    zero: tl.constexpr = MAP == "identity" or MAP == "norm_aware" or MAP == "signed_power"
    return 0.0 if zero else -1e4


@triton.jit
def absent_channel(MAP: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """`absent_value` for channels beyond D alone, where a missing token has a weight of zero, a
    gradient of zero or no result. Zero is what pipelined loads leave without a choice per channel.
    """
    return 0.0 if D == P else absent_value(MAP)


@triton.jit
def channel_parameters(rows, columns, head, d, D: tl.constexpr, MAP: tl.constexpr):
    """Of `signed_power`, whose tables take the place of the rotary ones, the powers and the
    reciprocal divisors (1, P) of a head's channels; of other maps nothing."""
    if MAP == "signed_power":
        at = head * D + d
        power = tl.load(rows + at, mask=d < D, other=1.0)
        return power, 1.0 / tl.load(columns + at, mask=d < D, other=1.0)
    else:
        return 0.0, 0.0


@triton.jit
def _norm_aware(q, EXACT: tl.constexpr):
    """Of each row: 1 / n, the exponent p(n) and dp / dn; and the logarithm of |q| / n.

    Of zeros, all are finite: what they make of a zero is multiplied by it, or by its sign.
    """
    square = tl.sum(q * q, 1)
    inverse = tl.rsqrt(tl.maximum(square, 1e-37, propagate_nan=tl.PropagateNan.ALL))
    e = exponential(-2.0 * square * inverse, EXACT)  # tanh n = (1 - e) / (1 + e)
    power = 1.5 + 3.0 * ((1.0 - e) / (1.0 + e))
    slope = 12.0 * e / ((1.0 + e) * (1.0 + e))
    log = logarithm(tl.maximum(tl.abs(q) * inverse[:, None], 1e-30), EXACT)
    return inverse, power, slope, log


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def _halves(x):
    """(T, P) to (T, 2 P): for each channel its positive part, then its negative part."""
    T: tl.constexpr = x.shape[0]
    P: tl.constexpr = x.shape[1]
    positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    negative = tl.maximum(-x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.reshape(tl.join(positive, negative), (T, 2 * P))


@triton.jit
def _halves_gradient(x, gradient):
    """The gradient of x, up to its sign, from the gradient of the `_halves` of x."""
    T: tl.constexpr = x.shape[0]
    P: tl.constexpr = x.shape[1]
    positive, negative = tl.split(tl.reshape(gradient, (T, P, 2)))
    return tl.where(x > 0, positive, tl.where(x < 0, -negative, 0.0))


@triton.jit
def _power_parts(x, power, inverse, EXACT: tl.constexpr):
    """t = |x / s|, log2 t and t^(p - 1); of a zero the last two are finite, and it is a factor."""
    t = tl.abs(x) * inverse
    positive = tl.maximum(t, 1e-30)
    log = tl.log2(positive) if EXACT else log2_approximate(positive)
    return t, log, exp2_approximate((power - 1.0) * log)


@triton.jit
def power_of(x, power, inverse, EXACT: tl.constexpr):
    """|x / s|^p: of a channel's two features the one of its sign. The other is zero."""
    t, _, root = _power_parts(x, power, inverse, EXACT)
    return t * root


@triton.jit
def power_gradient(x, power, inverse, gradient, EXACT: tl.constexpr):
    """From the gradient of `power_of`: that of x, log2(e) times that of p, -s / p times that of s.

    The last two are one token's.
    """
    t, log, root = _power_parts(x, power, inverse, EXACT)
    slope = gradient * root
    product = slope * t
    return slope * _sign(x) * (power * inverse), product * log, product


@triton.jit
def _signed_power(x, power, inverse, EXACT: tl.constexpr):
    """(T, P) to (T, 2 P): the `_halves` of sign(x) |x / s|^p."""
    T: tl.constexpr = x.shape[0]
    P: tl.constexpr = x.shape[1]
    y = power_of(x, power, inverse, EXACT)
    return tl.reshape(tl.join(tl.where(x > 0, y, 0.0), tl.where(x > 0, 0.0, y)), (T, 2 * P))


@triton.jit
def of_sign(x, f):
    """(T, 2 P) to (T, P): of the two entries of each channel that of the sign of x."""
    T: tl.constexpr = x.shape[0]
    P: tl.constexpr = x.shape[1]
    positive, negative = tl.split(tl.reshape(f, (T, P, 2)))
    return tl.where(x > 0, positive, negative)


@triton.jit
def query_feature(x, power, inverse, MAP: tl.constexpr, EXACT: tl.constexpr):
    """phi of queries (T, P): (T, P), or (T, 2 P) of a map that splits them by their signs."""
    if MAP == "norm_aware":
        _, exponent, _, log = _norm_aware(x, EXACT)
        return _halves(_sign(x) * exponential(exponent[:, None] * log, EXACT))
    elif MAP == "signed_power":
        return _signed_power(x, power, inverse, EXACT)
    else:
        return _feature(x, MAP, EXACT)


@triton.jit
def key_feature(x, power, inverse, MAP: tl.constexpr, EXACT: tl.constexpr):
    """phi of keys (T, P): (T, P), or (T, 2 P) of a map that splits them by their signs."""
    if MAP == "norm_aware":
        return _halves(x * x * x)
    elif MAP == "signed_power":
        return _signed_power(x, power, inverse, EXACT)
    else:
        return _feature(x, MAP, EXACT)


@triton.jit
def query_feature_gradient(x, f, gradient, MAP: tl.constexpr, EXACT: tl.constexpr):
    """The gradient of x from the gradient of f = query_feature(x)."""
    if MAP == "norm_aware":
        gradient = _halves_gradient(x, gradient)
        inverse, power, slope, log = _norm_aware(x, EXACT)
        # The gradient through each |q| / n, then through n, in all the quotients and the exponent.
        root = exponential((power[:, None] - 1.0) * log, EXACT)
        product = gradient * root * (x * inverse[:, None])
        radial = slope * tl.sum(product * log, 1) - power * inverse * tl.sum(product, 1)
        return (power * inverse)[:, None] * gradient * root + (radial * inverse)[:, None] * x
    else:
        return _feature_gradient(x, f, gradient, MAP)


@triton.jit
def key_feature_gradient(x, f, gradient, MAP: tl.constexpr):
    """The gradient of x from the gradient of f = key_feature(x)."""
    if MAP == "norm_aware":
        return 3.0 * x * x * _halves_gradient(x, gradient)
    else:
        return _feature_gradient(x, f, gradient, MAP)


@triton.jit
def _feature(x, MAP: tl.constexpr, EXACT: tl.constexpr):
    if MAP == "elu_plus_one":
        if EXACT:
            least = tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
            return tl.where(x > 0, x + 1.0, exponential(least, EXACT))
        else:
            return tl.where(x > 0, x + 1.0, exponential(x, EXACT))
    elif MAP == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif MAP == "exp":
        return exponential(x, EXACT)
    else:
        return x


@triton.jit
def _feature_gradient(x, f, gradient, MAP: tl.constexpr):
    """The gradient of x from the gradient of f = phi(x)."""
    if MAP == "elu_plus_one":
        return tl.where(x > 0, gradient, gradient * f)
    elif MAP == "relu":
        return tl.where(x > 0, gradient, 0.0)
    elif MAP == "exp":
        return gradient * f
    else:
        return gradient


@triton.jit
def readout_factors(n, tokens, scale, READOUT: tl.constexpr):
    """a(n), b(n) and their derivatives, of y = a R(f(q)) S + b mean(v)."""
    if READOUT == "normalized":
        a = 1.0 / (n + EPSILON)
        return a, n * 0.0, -a * a, n * 0.0
    elif READOUT == "summed":
        a = 1.0 / (n + EPSILON / tokens)
        return a, n * 0.0, -a * a, n * 0.0
    elif READOUT == "floored":
        least = FLOOR / tokens
        a = 1.0 / tl.maximum(n, least)
        return a, n * 0.0, tl.where(n < least, 0.0, -a * a), n * 0.0
    elif READOUT == "magnitude_aware":
        inverse = 1.0 / (scale * n + EPSILON)
        return scale * (1.0 + inverse), -scale * n, -(scale * inverse) * (scale * inverse), -scale
    else:
        return n * 0.0 + scale, 1.0 - scale * n, n * 0.0, -scale


@triton.jit
def state_row(e, d, D: tl.constexpr, READOUT: tl.constexpr):
    """The row of the state that feature `e` of a query reads for channel `d`.

    If polarized, the second half of the channels is for keys of the other sign.
    """
    return e ^ (d >= D // 2).to(tl.int32) if READOUT == "polarized" else e


@triton.jit
def load_means(means, K: tl.constexpr):
    """The mean features of keys (K,), and those of the other signs, as columns of (K, 16)."""
    column = tl.arange(0, 16)[None, :]
    return tl.load(means + (tl.arange(0, K)[:, None] ^ column), mask=column < 2, other=0.0)


@triton.jit
def as_columns(first, second):
    """Two vectors as the first columns of a matrix of 16, the narrowest that `dot` takes."""
    column = tl.arange(0, 16)[None, :]
    return tl.where(column == 0, first[:, None], tl.where(column == 1, second[:, None], 0.0))


@triton.jit
def first_columns(x):
    """What `as_columns` made a matrix of."""
    column = tl.arange(0, 16)[None, :]
    return tl.sum(tl.where(column == 0, x, 0.0), 1), tl.sum(tl.where(column == 1, x, 0.0), 1)


@triton.jit
def polarized_factors(f, means_high, means_low, EXACT: tl.constexpr):
    """1 / (n + 1e-6) of either half of the channels, of features f and split `load_means`.

    As products of matrices, for which f is laid out anyway: sums would have it made once more.
    """
    n = dot_halves(f, means_high, means_low, tl.zeros((f.shape[0], 16), tl.float32), EXACT)
    first, second = first_columns(n)
    return 1.0 / (first + EPSILON), 1.0 / (second + EPSILON)


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def polarized_gradient(f, t, means):
    """The gradient of f through f t / (f . means + 1e-6) of one half of the channels.

    Args:
        f: the `power_of` queries (T, P).
        t: the gradient of the quotient, times the state, and `means`, both `of_sign`.
    """
    # In one sum, which is in the layout of t: two would have f made in another one as well.
    n, product = tl.reduce((f * means, f * t), 1, _add_both)
    a = 1.0 / (n + EPSILON)
    # In this order a large n does not lose the second term, as its inverse squared is zero.
    return a[:, None] * t - (a * (a * product))[:, None] * means


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
    # Which of the tables a channel reads is the same for all tokens, and decided outside of loops.
    pointers = tl.where(in_rows, rows + i, columns + (i - quarter)) + (
        tl.where(in_rows, row[:, None], column[:, None]) * quarter
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
def _rotate(x, cosine, sine):
    T: tl.constexpr = x.shape[0]
    P: tl.constexpr = x.shape[1]
    a, b = tl.split(tl.reshape(x, (T, P // 2, 2)))
    return tl.reshape(tl.join(a * cosine - b * sine, b * cosine + a * sine), (T, P))


@triton.jit
def rotate(x, cosine, sine):
    """Turn neighbouring pairs of the last axis, or of each of the two `_halves`."""
    T: tl.constexpr = x.shape[0]
    P: tl.constexpr = 2 * cosine.shape[1]
    if x.shape[1] == P:
        return _rotate(x, cosine, sine)
    else:
        positive, negative = tl.split(tl.reshape(x, (T, P, 2)))
        turned = tl.join(_rotate(positive, cosine, sine), _rotate(negative, cosine, sine))
        return tl.reshape(turned, (T, 2 * P))


@triton.jit
def fold_sums(x):
    """`fold` for sums in the layout of the tensor cores, in which a thread holds rows 8 apart."""
    T: tl.constexpr = x.shape[0]
    P: tl.constexpr = x.shape[1]
    return tl.reshape(tl.sum(tl.reshape(x, (T // 16, 2, 8, P)), 1), (T // 2, P))


@triton.jit
def sum_splits(parts, count, P: tl.constexpr):
    """Sum of `count` rows of P floats, in a fixed order."""
    column = tl.arange(0, P)
    return sum_rows(parts, count, P, column, column < P, 4096 // P, P)
