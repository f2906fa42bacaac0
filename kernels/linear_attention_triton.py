"""The Triton kernels of `linear_attention`, forward and backward.

With p_j the key weights (a softmax over tokens, or 1 / N), f = phi, R the rotation and bars
means over tokens, a pass over the tokens is one kernel, split over tokens so that one image
fills the device:

    forward     query sums      sum f(q)                                    (key weights only)
                state           S = sum p R(f(k))^T v, mean p f(k), mean v  partial, per split
                merge           the partial sums in a fixed order, rescaled to one maximum
                readout         y = a(n) R(f(q)) S + b(n) mean v, epilogue
    backward    output gradient dS, d mean k, d mean v; dgate, dlocal
                merge
                key gradient    dk, dv and, per split, d mean q
                query gradient  dq, which with key weights needs d mean q

Nothing of size N is stored besides inputs and outputs: softmax and feature maps are
recomputed. Every sum has a fixed order, so two runs agree bit for bit.

The *state* that forward leaves for backward is float32, (B heads, P + 4, P) with P the head
width padded to a power of two: rows 0 .. P - 1 hold S, then follow mean k, mean v,
D^-0.5 mean q, and the softmax's maximum and sum.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import launch
from .triton_math import INTERPRETED, PTX, exp2_approximate, sum_rows

EPSILON = tl.constexpr(1e-6)
MOST_SPLITS = tl.constexpr(512)


@triton.jit
def _exp(x, EXACT: tl.constexpr):
    """exp(x), x finite. The hardware's exp2 of x log2(e) is off by |x| roundings: for float32
    inputs x is reduced to |r| <= ln(2) / 2 first, by an ln(2) in two parts."""
    if EXACT:
        whole = tl.floor(x * 1.4426950408889634 + 0.5)
        r = (x - whole * 0.693359375) + whole * 2.12194440e-4
        return tl.exp2(r * 1.4426950408889634) * tl.exp2(whole)
    else:
        return exp2_approximate(x * 1.4426950408889634)


@triton.jit
def _absent(MAP: tl.constexpr):
    """What stands for a missing token or channel: phi of it is zero."""
    return 0.0 if MAP == "identity" else -1e4


@triton.jit
def _feature(x, MAP: tl.constexpr, EXACT: tl.constexpr):
    if MAP == "elu_plus_one":
        if EXACT:
            return tl.where(x > 0, x + 1.0, _exp(tl.minimum(x, 0.0), EXACT))
        else:
            return tl.where(x > 0, x + 1.0, _exp(x, EXACT))
    elif MAP == "relu":
        return tl.maximum(x, 0.0)
    elif MAP == "exp":
        return _exp(x, EXACT)
    else:
        return x


@triton.jit
def _feature_gradient(x, f, gradient, MAP: tl.constexpr):
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
def _readout(n, scale, READOUT: tl.constexpr):
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
def _angles(
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
def _rotate(x, cosine, sine):
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
def _high(x, IEEE: tl.constexpr):
    if IEEE:
        return x.to(tl.float32)
    else:
        return _cut(x).to(tl.bfloat16)


@triton.jit
def _low(x, IEEE: tl.constexpr):
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
def _dot(a, b, accumulator, IEEE: tl.constexpr):
    """accumulator + a @ b, on the tensor cores unless `IEEE`.

    One rounding of phi and S to bfloat16 would be amplified where a readout subtracts nearly
    equal terms. So a float32 operand is split into high + low, 16 bits together, and only the
    product of two lows is left out; an operand that comes as bfloat16 is exact.
    """
    if IEEE:
        return tl.dot(a, b, accumulator, input_precision="ieee")
    elif b.dtype == tl.bfloat16:
        accumulator = _multiply(_high(a, False), b, accumulator)
        return _multiply(_low(a, False), b, accumulator)
    else:
        return _dot_halves(a, _high(b, False), _low(b, False), accumulator, False)


@triton.jit
def _dot_halves(a, b_high, b_low, accumulator, IEEE: tl.constexpr):
    """`_dot` with a `b` that is split already."""
    if IEEE:
        return tl.dot(a, b_high, accumulator, input_precision="ieee")
    elif a.dtype == tl.bfloat16:
        accumulator = _multiply(a, b_high, accumulator)
        return _multiply(a, b_low, accumulator)
    else:
        a_high = _high(a, False)
        accumulator = _multiply(a_high, b_high, accumulator)
        accumulator = _multiply(a_high, b_low, accumulator)
        return _multiply(_low(a, False), b_high, accumulator)


@triton.jit
def _operand(x, IEEE: tl.constexpr):
    """A loaded tensor as an operand of `_dot`: bfloat16 stays as it is, exact."""
    if IEEE or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def _fold(x, ROWS: tl.constexpr):
    """(T, P) to (ROWS, P), by sums over rows that one thread holds: registers, no exchange."""
    T: tl.constexpr = x.shape[0]
    return tl.sum(tl.reshape(x, (T // ROWS, ROWS, x.shape[1])), 0)


@triton.jit
def _fold_accumulated(x):
    """`_fold` for the tensor cores' layout of sums, where a thread holds rows 8 apart."""
    T: tl.constexpr = x.shape[0]
    P: tl.constexpr = x.shape[1]
    return tl.reshape(tl.sum(tl.reshape(x, (T // 16, 2, 8, P)), 1), (T // 2, P))


@triton.jit
def _sum_splits(parts, count, P: tl.constexpr):
    """Sum of `count` rows of P floats, in a fixed order."""
    column = tl.arange(0, P)
    return sum_rows(parts, count, P, column, column < P, 4096 // P, P)


_SCALARS = [
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


@triton.jit(do_not_specialize=_SCALARS)
def _query_sums(
    q, parts, q_b, q_n, q_h,
    tokens, per_split, heads,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr,
    MAP: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0)
    split = tl.program_id(1)
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    q += (bh // heads).to(tl.int64) * q_b + (bh % heads) * q_h
    d = tl.arange(0, P)[None, :]
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    total = tl.zeros((FOLD, P), tl.float32)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        ok = (n < last)[:, None] & (d < D)
        x = tl.load(q + n.to(tl.int64)[:, None] * q_n + d, mask=ok, other=_absent(MAP)).to(
            tl.float32
        )
        total += _fold(_feature(x, MAP, EXACT), FOLD)
    at = bh.to(tl.int64) * tl.num_programs(1) + split
    tl.store(parts + at * P + tl.arange(0, P), tl.sum(total, 0))


@triton.jit(do_not_specialize=_SCALARS)
def _state(
    k, v, rows, columns, query_parts, parts,
    k_b, k_n, k_h, v_b, v_n, v_h,
    tokens, per_split, heads, width, reciprocal, shift, row_stride, column_stride,
    query_splits, scale,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr,
    MAP: tl.constexpr,
    WEIGHTED: tl.constexpr, ROTARY: tl.constexpr, MEAN_VALUE: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0)
    split = tl.program_id(1)
    IEEE: tl.constexpr = v.dtype.element_ty == tl.float32
    EXACT: tl.constexpr = k.dtype.element_ty == tl.float32
    k += (bh // heads).to(tl.int64) * k_b + (bh % heads) * k_h
    v += (bh // heads).to(tl.int64) * v_b + (bh % heads) * v_h
    d = tl.arange(0, P)[None, :]
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)

    if WEIGHTED:
        query = _sum_splits(query_parts + bh.to(tl.int64) * query_splits * P, query_splits, P)
        query = (query * (scale / tokens))[None, :]  # rounded as in _merge: equal scores
    maximum = -float("inf")
    mass = tl.zeros((BLOCK,), tl.float32)
    key_sum = tl.zeros((FOLD, P), tl.float32)
    value_sum = tl.zeros((FOLD, P), tl.float32)
    state = tl.zeros((P, P), tl.float32)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        valid = n < last
        ok = valid[:, None] & (d < D)
        at = n.to(tl.int64)[:, None]
        x = tl.load(k + at * k_n + d, mask=ok, other=_absent(MAP)).to(tl.float32)
        value = tl.load(v + at * v_n + d, mask=ok, other=0.0)
        f = _feature(x, MAP, EXACT)
        if WEIGHTED:
            score = tl.where(valid, tl.sum(f * query, 1), -float("inf"))
            higher = tl.maximum(maximum, tl.max(score, 0))
            shrink = tl.exp(maximum - higher)
            weight = _exp(tl.where(valid, score - higher, -1e4), EXACT)
            maximum = higher
            mass = mass * shrink + weight
            f *= weight[:, None]
            key_sum = key_sum * shrink + _fold(f, FOLD)
            state *= shrink
        else:
            key_sum += _fold(f, FOLD)
        if MEAN_VALUE:
            value_sum += _fold(value.to(tl.float32), FOLD)
        if ROTARY:
            cosine, sine = _angles(
                rows, columns, n, last, width, reciprocal, shift, row_stride, column_stride,
                D, P, True,
            )  # fmt: skip
            f = _rotate(f, cosine, sine)
        # Transposed, v^T is the operand that the tensor cores read where it was loaded.
        state = _dot(tl.trans(_operand(value, IEEE)), f, state, IEEE)

    row = tl.arange(0, P)
    parts += (bh.to(tl.int64) * tl.num_programs(1) + split) * ((P + 3) * P)
    tl.store(parts + row[None, :] * P + row[:, None], state)
    tl.store(parts + P * P + row, tl.sum(key_sum, 0))
    if MEAN_VALUE:
        tl.store(parts + (P + 1) * P + row, tl.sum(value_sum, 0))
    if WEIGHTED:
        tl.store(parts + (P + 2) * P, maximum)
        tl.store(parts + (P + 2) * P + 1, tl.sum(mass, 0))


@triton.jit(do_not_specialize=_SCALARS)
def _merge(
    parts, query_parts, total, state, tokens, splits, query_splits, scale,
    P: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    WEIGHTED: tl.constexpr, MEAN_VALUE: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Sum the splits' partial states: ROWS rows of one head a program.

    Forward divides by the softmax's sum (or by N); backward sums alone, and leaves in the last
    two rows the pieces of <S, dS> + <mean k, d mean k>, which the softmax's gradient subtracts.
    """
    bh = tl.program_id(0)
    block = tl.program_id(1)
    size: tl.constexpr = (P + 3) * P
    parts += bh.to(tl.int64) * splits * size
    total += bh.to(tl.int64) * ((P + 4) * P)
    chunk = tl.arange(0, CHUNK)
    column = tl.arange(0, P)
    row = block * ROWS + tl.arange(0, ROWS)
    is_value = row == P + 1
    is_key = row < P + 1
    live = row < P + 2 if MEAN_VALUE else is_key

    maximum = 0.0
    mass = 0.0
    if WEIGHTED:
        maxima = tl.full((CHUNK,), -float("inf"), tl.float32)
        for start in range(0, splits, CHUNK):
            pointers = parts + (start + chunk) * size + (P + 2) * P
            maxima = tl.maximum(
                maxima, tl.load(pointers, mask=start + chunk < splits, other=-float("inf"))
            )
        maximum = tl.max(maxima, 0)
        masses = tl.zeros((CHUNK,), tl.float32)
    result = tl.zeros((ROWS, P), tl.float32)
    for start in range(0, splits, CHUNK):
        here = start + chunk
        valid = here < splits
        tile = tl.load(
            parts
            + here.to(tl.int64)[:, None, None] * size
            + row[None, :, None] * P
            + column[None, None, :],
            mask=valid[:, None, None] & live[None, :, None],
            other=0.0,
        )
        if WEIGHTED:
            pointers = parts + here * size + (P + 2) * P
            factor = tl.exp(tl.load(pointers, mask=valid, other=-float("inf")) - maximum)
            masses += factor * tl.load(pointers + 1, mask=valid, other=0.0)
            tile *= tl.where(is_value[None, :], 1.0, factor[:, None])[:, :, None]
        result += tl.sum(tile, 0)
    if not BACKWARD:
        if WEIGHTED:
            mass = tl.sum(masses, 0)
            result /= tl.where(is_value, tokens.to(tl.float32), mass)[:, None]
        else:
            result /= tokens.to(tl.float32)
    pointers = row[:, None] * P + column[None, :]
    tl.store(total + pointers, result, mask=(row < P + 2)[:, None])
    if BACKWARD:
        forward = tl.load(
            state + bh.to(tl.int64) * ((P + 4) * P) + pointers, mask=is_key[:, None], other=0.0
        )
        inner = tl.sum(tl.sum(tl.where(is_key[:, None], result * forward, 0.0), 1), 0)
        tl.store(total + (P + 2) * P + block, inner)
    elif block == 0:
        query = tl.zeros((P,), tl.float32)
        if WEIGHTED:
            query += _sum_splits(query_parts + bh.to(tl.int64) * query_splits * P, query_splits, P)
        tl.store(total + (P + 2) * P + column, query * (scale / tokens))
        softmax = tl.where(column == 0, maximum, tl.where(column == 1, mass, 0.0))
        tl.store(total + (P + 3) * P + column, softmax)


@triton.jit(do_not_specialize=_SCALARS)
def _read(
    q, rows, columns, local, gate, state, out,
    q_b, q_n, q_h, l_b, l_n, l_h, g_b, g_n, g_h, o_b, o_n, o_h,
    tokens, per_split, heads, width, reciprocal, shift, row_stride, column_stride, scale,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr,
    READOUT: tl.constexpr, ROTARY: tl.constexpr, LOCAL: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0)
    split = tl.program_id(1)
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    q += b * q_b + h * q_h
    out += b * o_b + h * o_h
    if LOCAL:
        local += b * l_b + h * l_h
    if GATE:
        gate += b * g_b + h * g_h
    column = tl.arange(0, P)
    d = column[None, :]
    state += bh.to(tl.int64) * ((P + 4) * P)
    s = tl.load(state + column[:, None] * P + d)
    s_high = _high(s, EXACT)
    s_low = _low(s, EXACT)
    key = tl.load(state + P * P + d)
    if READOUT != "normalized":
        mean_value = tl.load(state + (P + 1) * P + d)
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        ok = (n < last)[:, None] & (d < D)
        at = n.to(tl.int64)[:, None]
        x = tl.load(q + at * q_n + d, mask=ok, other=_absent(MAP)).to(tl.float32)
        # Long before they are used, so that the arithmetic hides how long they take.
        if LOCAL:
            branch = tl.load(local + at * l_n + d, mask=ok, other=0.0)
        if GATE:
            factor = tl.load(gate + at * g_n + d, mask=ok, other=0.0)
        f = _feature(x, MAP, EXACT)
        a, b_, _, _ = _readout(tl.sum(f * key, 1), scale, READOUT)
        if ROTARY:
            cosine, sine = _angles(
                rows, columns, n, last, width, reciprocal, shift, row_stride, column_stride,
                D, P, True,
            )  # fmt: skip
            f = _rotate(f, cosine, sine)
        y = _dot_halves(f, s_high, s_low, tl.zeros((BLOCK, P), tl.float32), EXACT) * a[:, None]
        if READOUT != "normalized":
            y += b_[:, None] * mean_value
        if LOCAL:
            y += branch.to(tl.float32)
        if GATE:
            y *= factor.to(tl.float32)
        tl.store(out + at * o_n + d, y.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=_SCALARS)
def _output_gradient(
    q, go, rows, columns, local, gate, state, parts, dlocal, dgate,
    q_b, q_n, q_h, go_b, go_n, go_h, l_b, l_n, l_h, g_b, g_n, g_h,
    dl_b, dl_n, dl_h, dg_b, dg_n, dg_h,
    tokens, per_split, heads, width, reciprocal, shift, row_stride, column_stride, scale,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr,
    READOUT: tl.constexpr, ROTARY: tl.constexpr,
    LOCAL: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0)
    split = tl.program_id(1)
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    q += b * q_b + h * q_h
    go += b * go_b + h * go_h
    if LOCAL:
        local += b * l_b + h * l_h
        dlocal += b * dl_b + h * dl_h
    if GATE:
        gate += b * g_b + h * g_h
        dgate += b * dg_b + h * dg_h
    column = tl.arange(0, P)
    d = column[None, :]
    state += bh.to(tl.int64) * ((P + 4) * P)
    s = tl.load(state + column[:, None] * P + d)
    s_high = _high(s, EXACT)
    s_low = _low(s, EXACT)
    key = tl.load(state + P * P + d)
    if READOUT != "normalized":
        mean_value = tl.load(state + (P + 1) * P + d)
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    dkey_sum = tl.zeros((BLOCK // 2, P), tl.float32)
    dvalue_sum = tl.zeros((BLOCK // 2, P), tl.float32)
    dstate = tl.zeros((P, P), tl.float32)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        ok = (n < last)[:, None] & (d < D)
        at = n.to(tl.int64)[:, None]
        x = tl.load(q + at * q_n + d, mask=ok, other=_absent(MAP)).to(tl.float32)
        grad = tl.load(go + at * go_n + d, mask=ok, other=0.0)
        if GATE:
            factor = tl.load(gate + at * g_n + d, mask=ok, other=0.0)
        if LOCAL:
            branch = tl.load(local + at * l_n + d, mask=ok, other=0.0)
        f = _feature(x, MAP, EXACT)
        a, b_, da, db = _readout(tl.sum(f * key, 1), scale, READOUT)
        r = f
        if ROTARY:
            cosine, sine = _angles(
                rows, columns, n, last, width, reciprocal, shift, row_stride, column_stride,
                D, P, True,
            )  # fmt: skip
            r = _rotate(f, cosine, sine)
        # Rounded once and used so everywhere: the gradient of a dy that is off by one rounding,
        # with no term that ceases to cancel another.
        dy = (grad.to(tl.float32) * factor.to(tl.float32)).to(grad.dtype) if GATE else grad
        dy_operand = _operand(dy, EXACT)
        dy = dy.to(tl.float32)
        if GATE:
            y = _dot_halves(r, s_high, s_low, tl.zeros((BLOCK, P), tl.float32), EXACT)
            dn = da * tl.sum(dy * y, 1)
            y *= a[:, None]
            if READOUT != "normalized":
                y += b_[:, None] * mean_value
            if LOCAL:
                y += branch.to(tl.float32)
            tl.store(
                dgate + at * dg_n + d,
                (y * grad.to(tl.float32)).to(dgate.dtype.element_ty),
                mask=ok,
            )
        else:
            t = _dot_halves(
                dy_operand,
                tl.trans(s_high),
                tl.trans(s_low),
                tl.zeros((BLOCK, P), tl.float32),
                EXACT,
            )
            dn = da * tl.sum(r * t, 1)
        if LOCAL:
            tl.store(dlocal + at * dl_n + d, dy.to(dlocal.dtype.element_ty), mask=ok)
        if READOUT != "normalized":
            dn += db * tl.sum(dy * mean_value, 1)
            dvalue_sum += _fold_accumulated(b_[:, None] * dy)
        dkey_sum += _fold_accumulated(dn[:, None] * f)
        dstate = _dot(tl.trans(dy_operand), r * a[:, None], dstate, EXACT)

    parts += (bh.to(tl.int64) * tl.num_programs(1) + split) * ((P + 3) * P)
    tl.store(parts + d * P + column[:, None], dstate)
    tl.store(parts + P * P + column, tl.sum(dkey_sum, 0))
    if READOUT != "normalized":
        tl.store(parts + (P + 1) * P + column, tl.sum(dvalue_sum, 0))


@triton.jit(do_not_specialize=_SCALARS)
def _key_gradient(
    k, v, rows, columns, state, dtotal, query_parts, excess, dk, dv,
    k_b, k_n, k_h, v_b, v_n, v_h, dk_b, dk_n, dk_h, dv_b, dv_n, dv_h,
    tokens, per_split, heads, width, reciprocal, shift, row_stride, column_stride,
    query_splits, pieces, scale,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr,
    WEIGHTED: tl.constexpr, ROTARY: tl.constexpr, MEAN_VALUE: tl.constexpr,
    ADD: tl.constexpr, MEASURE: tl.constexpr, CORRECT: tl.constexpr,
):  # fmt: skip
    """dk, dv and the partial sums of d mean q.

    A softmax that is nearly one-hot leaves of dp - sum(p dp) only roundings, unless the sum is
    of the very dp that it is taken from. So float32 and float16 first MEASURE, in a run that
    writes nothing else, by how much that sum exceeds <S, dS> + <mean k, d mean k>, and then
    CORRECT it. bfloat16 cannot tell.
    """
    bh = tl.program_id(0)
    split = tl.program_id(1)
    EXACT: tl.constexpr = k.dtype.element_ty == tl.float32
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    dk += b * dk_b + h * dk_h
    dv += b * dv_b + h * dv_h
    column = tl.arange(0, P)
    d = column[None, :]
    state += bh.to(tl.int64) * ((P + 4) * P)
    dtotal += bh.to(tl.int64) * ((P + 4) * P)
    ds = tl.load(dtotal + column[:, None] * P + d)
    ds_high = _high(ds, EXACT)
    ds_low = _low(ds, EXACT)
    dkey = tl.load(dtotal + P * P + d)
    if MEAN_VALUE:
        dvalue = tl.load(dtotal + (P + 1) * P + d) / tokens
    if WEIGHTED:
        query = tl.load(state + (P + 2) * P + d)
        maximum = tl.load(state + (P + 3) * P)
        inverse = 1.0 / tl.load(state + (P + 3) * P + 1)
        piece = tl.arange(0, 2 * P)
        inner = tl.sum(tl.load(dtotal + (P + 2) * P + piece, mask=piece < pieces, other=0.0), 0)
        if CORRECT:
            piece = tl.arange(0, MOST_SPLITS)
            measured = excess + bh.to(tl.int64) * query_splits + piece
            inner += tl.sum(tl.load(measured, mask=piece < query_splits, other=0.0), 0)
        dquery_sum = tl.zeros((BLOCK // 2, P), tl.float32)
        excess_sum = tl.zeros((BLOCK,), tl.float32)
    else:
        weight = 1.0 / tokens
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        valid = n < last
        ok = valid[:, None] & (d < D)
        at = n.to(tl.int64)[:, None]
        x = tl.load(k + at * k_n + d, mask=ok, other=_absent(MAP)).to(tl.float32)
        value = _operand(tl.load(v + at * v_n + d, mask=ok, other=0.0), EXACT)
        f = _feature(x, MAP, EXACT)
        r = f
        if ROTARY:
            cosine, sine = _angles(
                rows, columns, n, last, width, reciprocal, shift, row_stride, column_stride,
                D, P, False,
            )  # fmt: skip
            r = _rotate(f, cosine, sine)
        t = _dot_halves(
            value, tl.trans(ds_high), tl.trans(ds_low), tl.zeros((BLOCK, P), tl.float32), EXACT
        )
        if ROTARY:
            t = _rotate(t, cosine, -sine)
        t += dkey
        if WEIGHTED:
            score = tl.where(valid, tl.sum(f * query, 1) - maximum, -1e4)
            weight = _exp(score, EXACT) * inverse
            dscore = weight * (tl.sum(f * t, 1) - inner)
            t = t * weight[:, None] + dscore[:, None] * query
            excess_sum += tl.where(valid, dscore, 0.0)
            dquery_sum += _fold_accumulated((dscore * scale)[:, None] * f)
        else:
            t *= weight
        if not MEASURE:
            t = _feature_gradient(x, f, t, MAP)
            tl.store(dk + at * dk_n + d, t.to(dk.dtype.element_ty), mask=ok)
            y = _dot_halves(r, ds_high, ds_low, tl.zeros((BLOCK, P), tl.float32), EXACT)
            if WEIGHTED:
                y *= weight[:, None]
            else:
                y *= weight
            if MEAN_VALUE:
                y += dvalue
            if ADD:
                y += tl.load(dv + at * dv_n + d, mask=ok, other=0.0).to(tl.float32)
            tl.store(dv + at * dv_n + d, y.to(dv.dtype.element_ty), mask=ok)
    if WEIGHTED:
        place = bh.to(tl.int64) * tl.num_programs(1) + split
        if MEASURE:
            tl.store(excess + place, tl.sum(excess_sum, 0))
        else:
            tl.store(query_parts + place * P + column, tl.sum(dquery_sum, 0))


@triton.jit(do_not_specialize=_SCALARS)
def _query_gradient(
    q, go, rows, columns, gate, state, query_parts, dq,
    q_b, q_n, q_h, go_b, go_n, go_h, g_b, g_n, g_h, dq_b, dq_n, dq_h,
    tokens, per_split, heads, width, reciprocal, shift, row_stride, column_stride,
    query_splits, scale,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr,
    WEIGHTED: tl.constexpr, READOUT: tl.constexpr, ROTARY: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0)
    split = tl.program_id(1)
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    q += b * q_b + h * q_h
    go += b * go_b + h * go_h
    dq += b * dq_b + h * dq_h
    if GATE:
        gate += b * g_b + h * g_h
    column = tl.arange(0, P)
    d = column[None, :]
    state += bh.to(tl.int64) * ((P + 4) * P)
    s = tl.load(state + d * P + column[:, None])
    s_high = _high(s, EXACT)
    s_low = _low(s, EXACT)
    key = tl.load(state + P * P + d)
    if READOUT != "normalized":
        mean_value = tl.load(state + (P + 1) * P + d)
    if WEIGHTED:
        dquery = _sum_splits(query_parts + bh.to(tl.int64) * query_splits * P, query_splits, P)
        dquery = (dquery / tokens)[None, :]
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        ok = (n < last)[:, None] & (d < D)
        at = n.to(tl.int64)[:, None]
        x = tl.load(q + at * q_n + d, mask=ok, other=_absent(MAP)).to(tl.float32)
        dy = tl.load(go + at * go_n + d, mask=ok, other=0.0)
        if GATE:
            factor = tl.load(gate + at * g_n + d, mask=ok, other=0.0).to(tl.float32)
            dy = (dy.to(tl.float32) * factor).to(dy.dtype)
        f = _feature(x, MAP, EXACT)
        a, _, da, db = _readout(tl.sum(f * key, 1), scale, READOUT)
        t = _dot_halves(_operand(dy, EXACT), s_high, s_low, tl.zeros((BLOCK, P), tl.float32), EXACT)
        if ROTARY:
            cosine, sine = _angles(
                rows, columns, n, last, width, reciprocal, shift, row_stride, column_stride,
                D, P, False,
            )  # fmt: skip
            t = _rotate(t, cosine, -sine)
        # A rotation turned back on one factor of a product turns the other forth.
        dn = da * tl.sum(f * t, 1)
        if READOUT != "normalized":
            dn += db * tl.sum(dy.to(tl.float32) * mean_value, 1)
        t = t * a[:, None] + dn[:, None] * key
        if WEIGHTED:
            t += dquery
        t = _feature_gradient(x, f, t, MAP)
        tl.store(dq + at * dq_n + d, t.to(dq.dtype.element_ty), mask=ok)


REGISTERS = 65536  # of a multiprocessor
MERGE_ELEMENTS = 4096


@dataclass(frozen=True)
class Tile:
    """How a kernel runs: tokens a step, warps, pipeline stages, the programs that a
    multiprocessor holds at once, and the fewest tokens worth a program."""

    block: int
    warps: int
    stages: int
    resident: int
    least: int


# By kernel, for 16-bit inputs and padded head widths up to 64 and up to 128; chosen by
# registers, spills and instructions in the machine code, see docs/performance.md.
TILES = {
    "query_sums": {64: Tile(64, 4, 1, 8, 256), 128: Tile(64, 8, 1, 4, 256)},
    "state": {64: Tile(64, 4, 2, 3, 256), 128: Tile(64, 8, 1, 1, 512)},
    "read": {64: Tile(64, 4, 3, 3, 128), 128: Tile(64, 8, 1, 1, 256)},
    "output_gradient": {64: Tile(64, 4, 2, 2, 256), 128: Tile(64, 8, 1, 1, 512)},
    "key_gradient": {64: Tile(64, 4, 3, 2, 256), 128: Tile(64, 8, 1, 1, 256)},
    "query_gradient": {64: Tile(64, 4, 2, 3, 128), 128: Tile(64, 8, 1, 1, 256)},
}
# float32 multiplies without tensor cores, and holds its operands in registers.
WIDE_TILES = {64: Tile(16, 8, 1, 2, 128), 128: Tile(16, 16, 1, 1, 128)}


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 2  # Triton's interpreter: few programs, but more than one split
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def _split(tile: Tile, rows: int, tokens: int, multiprocessors: int) -> tuple[int, int]:
    """Programs a head, and tokens a program, for the fewest steps of the whole device."""
    steps = triton.cdiv(tokens, tile.block)

    def time(splits: int) -> int:
        each = triton.cdiv(steps, splits)
        programs = rows * triton.cdiv(steps, each)
        # Starting and ending a program costs about two steps.
        return triton.cdiv(programs, tile.resident * multiprocessors) * (each + 2)

    splits = min(range(1, max(1, min(MOST_SPLITS.value, tokens // tile.least)) + 1), key=time)
    each = triton.cdiv(steps, splits) * tile.block
    return triton.cdiv(tokens, each), each


class Problem:
    """One call's sizes and flags, and the launch of each kernel."""

    def __init__(
        self,
        query: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        feature_map: str,
        key_weights: str,
        readout: str,
    ):
        self.batch, self.tokens, self.heads, self.width = query.shape
        self.padded = max(16, 1 << (self.width - 1).bit_length())
        self.rows = self.batch * self.heads
        self.device = query.device
        self.itemsize = query.element_size()
        self.scale = self.width**-0.5
        self.weighted = key_weights == "global_query"
        self.readout = readout
        self.mean_value = readout != "normalized"
        self.map = feature_map
        self.rotary = rotary is not None
        if rotary is None:
            self.tables = (query, query, 1, 1 << 31, 31, 0, 0)
        else:
            rows, columns = (table.float().contiguous() for table in rotary)
            width = columns.shape[1]
            # n // width = n * reciprocal >> shift, exactly, for every n < 2^31.
            shift = 31 + (width - 1).bit_length()
            reciprocal = -(-(1 << shift) // width)
            self.tables = (
                rows, columns, width, reciprocal, shift, rows.stride(0), columns.stride(0),
            )  # fmt: skip

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def tile(self, kernel: str) -> Tile:
        width = 64 if self.padded <= 64 else 128
        return WIDE_TILES[width] if self.itemsize == 4 else TILES[kernel][width]

    def split(self, tile: Tile) -> tuple[int, int]:
        return _split(tile, self.rows, self.tokens, _multiprocessors(self.device))

    def options(self, tile: Tile) -> dict:
        return {
            "D": self.width,
            "P": self.padded,
            "BLOCK": tile.block,
            "MAP": self.map,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            "maxnreg": min(255, REGISTERS // (tile.resident * tile.warps * 32) // 8 * 8),
        }

    def fold(self, tile: Tile) -> int:
        """The rows that a program's warps load at once, 16 bytes a thread."""
        return min(tile.block, tile.warps * 512 // (self.padded * self.itemsize))

    def query_sums(self, query: Tensor) -> Tensor:
        tile = self.tile("query_sums")
        splits, per_split = self.split(tile)
        parts = self.empty(self.rows, splits, self.padded)
        launch(
            _query_sums, (self.rows, splits),
            query, parts, *query.stride()[:3], self.tokens, per_split, self.heads,
            FOLD=self.fold(tile), **self.options(tile),
        )  # fmt: skip
        return parts

    def state(self, key: Tensor, value: Tensor, query_parts: Tensor | None) -> Tensor:
        tile = self.tile("state")
        splits, per_split = self.split(tile)
        parts = self.empty(self.rows, splits, self.padded + 3, self.padded)
        rows, columns, *table = self.tables
        launch(
            _state, (self.rows, splits),
            key, value, rows, columns, parts if query_parts is None else query_parts, parts,
            *key.stride()[:3], *value.stride()[:3],
            self.tokens, per_split, self.heads, *table,
            0 if query_parts is None else query_parts.shape[1], self.scale,
            FOLD=self.fold(tile),
            WEIGHTED=self.weighted, ROTARY=self.rotary, MEAN_VALUE=self.mean_value,
            **self.options(tile),
        )  # fmt: skip
        return self.merge(parts, query_parts)

    def merge_tile(self, splits: int) -> tuple[int, int]:
        """The state's rows a program of `_merge`, and the splits that it sums at a time: of few
        heads, which have many splits, small pieces, that the device be busy."""
        chunk = 8 if splits <= 16 else 64
        return max(1, MERGE_ELEMENTS // (chunk * self.padded)), chunk

    def pieces(self) -> int:
        """How many programs a head merge the state's gradient, of which each leaves a piece."""
        splits, _ = self.split(self.tile("output_gradient"))
        return -(-(self.padded + 2) // self.merge_tile(splits)[0])

    def merge(
        self, parts: Tensor, query_parts: Tensor | None = None, state: Tensor | None = None
    ) -> Tensor:
        rows, chunk = self.merge_tile(parts.shape[1])
        total = self.empty(self.rows, self.padded + 4, self.padded)
        backward = state is not None
        launch(
            _merge, (self.rows, -(-(self.padded + 2) // rows)),
            parts, parts if query_parts is None else query_parts, total,
            total if state is None else state, self.tokens, parts.shape[1],
            0 if query_parts is None else query_parts.shape[1], self.scale,
            P=self.padded, ROWS=rows, CHUNK=chunk,
            WEIGHTED=self.weighted and not backward, MEAN_VALUE=self.mean_value,
            BACKWARD=backward, num_warps=4,
        )  # fmt: skip
        return total

    def read(
        self, query: Tensor, state: Tensor, local: Tensor | None, gate: Tensor | None, out: Tensor
    ) -> None:
        tile = self.tile("read")
        splits, per_split = self.split(tile)
        rows, columns, *table = self.tables
        launch(
            _read, (self.rows, splits),
            query, rows, columns, _or(local, query), _or(gate, query), state, out,
            *_strides(query), *_strides(local), *_strides(gate), *_strides(out),
            self.tokens, per_split, self.heads, *table, self.scale,
            READOUT=self.readout, ROTARY=self.rotary,
            LOCAL=local is not None, GATE=gate is not None, **self.options(tile),
        )  # fmt: skip

    def output_gradient(
        self,
        query: Tensor,
        grad: Tensor,
        state: Tensor,
        local: Tensor | None,
        gate: Tensor | None,
        dlocal: Tensor | None,
        dgate: Tensor | None,
    ) -> Tensor:
        tile = self.tile("output_gradient")
        splits, per_split = self.split(tile)
        parts = self.empty(self.rows, splits, self.padded + 3, self.padded)
        rows, columns, *table = self.tables
        launch(
            _output_gradient, (self.rows, splits),
            query, grad, rows, columns, _or(local, query), _or(gate, query), state, parts,
            _or(dlocal, query), _or(dgate, query),
            *_strides(query), *_strides(grad), *_strides(local), *_strides(gate),
            *_strides(dlocal), *_strides(dgate),
            self.tokens, per_split, self.heads, *table, self.scale,
            READOUT=self.readout, ROTARY=self.rotary,
            LOCAL=local is not None, GATE=gate is not None, **self.options(tile),
        )  # fmt: skip
        return self.merge(parts, state=state)

    def key_gradient(
        self,
        key: Tensor,
        value: Tensor,
        state: Tensor,
        dstate: Tensor,
        dkey: Tensor,
        dvalue: Tensor,
        add: bool,
    ) -> Tensor:
        tile = self.tile("key_gradient")
        splits, per_split = self.split(tile)
        query_parts = self.empty(self.rows, splits, self.padded)
        excess = self.empty(self.rows, splits)
        rows, columns, *table = self.tables
        correct = self.weighted and key.dtype != torch.bfloat16
        for measure in (True, False) if correct else (False,):
            launch(
                _key_gradient, (self.rows, splits),
                key, value, rows, columns, state, dstate, query_parts, excess, dkey, dvalue,
                *_strides(key), *_strides(value), *_strides(dkey), *_strides(dvalue),
                self.tokens, per_split, self.heads, *table, splits, self.pieces(), self.scale,
                WEIGHTED=self.weighted, ROTARY=self.rotary, MEAN_VALUE=self.mean_value,
                ADD=add,
                MEASURE=measure, CORRECT=correct and not measure, **self.options(tile),
            )  # fmt: skip
        return query_parts

    def query_gradient(
        self,
        query: Tensor,
        grad: Tensor,
        state: Tensor,
        query_parts: Tensor,
        gate: Tensor | None,
        dquery: Tensor,
    ) -> None:
        tile = self.tile("query_gradient")
        splits, per_split = self.split(tile)
        rows, columns, *table = self.tables
        launch(
            _query_gradient, (self.rows, splits),
            query, grad, rows, columns, _or(gate, query), state, query_parts, dquery,
            *_strides(query), *_strides(grad), *_strides(gate), *_strides(dquery),
            self.tokens, per_split, self.heads, *table, query_parts.shape[1], self.scale,
            WEIGHTED=self.weighted, READOUT=self.readout, ROTARY=self.rotary,
            GATE=gate is not None, **self.options(tile),
        )  # fmt: skip


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]


def forward(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    local: Tensor | None,
    gate: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Write the result to `out`; return the state that `backward` needs."""
    query_parts = problem.query_sums(query) if problem.weighted else None
    state = problem.state(key, value, query_parts)
    problem.read(query, state, local, gate, out)
    return state


def backward(
    problem: Problem,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    local: Tensor | None,
    gate: Tensor | None,
    state: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    dlocal: Tensor | None,
    dgate: Tensor | None,
    between=None,
) -> None:
    """Write every gradient. `between` runs once `dlocal` is complete, and may leave in `dvalue`
    what comes through the local branch: the gradient here is then added to it."""
    dstate = problem.output_gradient(query, grad, state, local, gate, dlocal, dgate)
    if between is not None:
        between()
    query_parts = problem.key_gradient(
        key, value, state, dstate, dkey, dvalue, add=between is not None
    )
    if dlocal is not None:
        # The product grad * gate is there already: one tensor to read, not two.
        grad, gate = dlocal, None
    problem.query_gradient(query, grad, state, query_parts, gate, dquery)
