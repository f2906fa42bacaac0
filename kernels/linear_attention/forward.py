"""The forward kernels of `linear_attention`; `plan.py` has their order."""

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from ..runtime.mathematics import (
    dot,
    dot_halves,
    exponential,
    fold,
    high_part,
    low_part,
    operand,
    rounded,
    shrinkage,
    single,
)
from .mathematics import (
    SCALARS,
    absent_channel,
    absent_value,
    angles,
    channel_parameters,
    key_feature,
    load_means,
    polarized_factors,
    query_feature,
    readout_factors,
    rotate,
    state_row,
    sum_splits,
)
from .plan import Plan


@triton.jit(do_not_specialize=SCALARS)
def _query_sums(
    q, parts, q_b, q_n, q_h,
    tokens, per_split, heads,
    D: tl.constexpr, P: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr,
    MAP: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0)
    split = tl.program_id(1)
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    q += (bh // heads).to(tl.int64) * q_b + (bh % heads) * q_h
    d = tl.arange(0, P)[None, :]
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    total = tl.zeros((FOLD, K), tl.float32)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        ok = (n < last)[:, None] & (d < D)
        at = n.to(tl.int64)[:, None]
        x = tl.load(q + at * q_n + d, mask=ok, other=absent_value(MAP)).to(tl.float32)
        total += fold(query_feature(x, 0.0, 0.0, MAP, EXACT), FOLD)
    at = bh.to(tl.int64) * tl.num_programs(1) + split
    tl.store(parts + at * K + tl.arange(0, K), tl.sum(total, 0))


@triton.jit(do_not_specialize=SCALARS)
def _state(
    k, v, rows, columns, query_parts, parts,
    k_b, k_n, k_h, v_b, v_n, v_h,
    tokens, per_split, heads, width, reciprocal, shift, row_stride, column_stride,
    query_splits, scale,
    D: tl.constexpr, P: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr,
    MAP: tl.constexpr,
    WEIGHTED: tl.constexpr, ROTARY: tl.constexpr, MEAN_VALUE: tl.constexpr,
):  # fmt: skip
    scale = single(scale)
    bh = tl.program_id(0)
    split = tl.program_id(1)
    IEEE: tl.constexpr = v.dtype.element_ty == tl.float32
    EXACT: tl.constexpr = k.dtype.element_ty == tl.float32
    k += (bh // heads).to(tl.int64) * k_b + (bh % heads) * k_h
    v += (bh // heads).to(tl.int64) * v_b + (bh % heads) * v_h
    d = tl.arange(0, P)[None, :]
    power, inverse = channel_parameters(rows, columns, bh % heads, d, D, MAP)
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)

    if WEIGHTED:
        query = sum_splits(query_parts + bh.to(tl.int64) * query_splits * K, query_splits, K)
        query = (query * (scale / tokens))[None, :]  # rounded as in `merge`: equal scores
    maximum = -float("inf")
    mass = tl.zeros((BLOCK,), tl.float32)
    key_sum = tl.zeros((FOLD, K), tl.float32)
    value_sum = tl.zeros((FOLD, P), tl.float32)
    state = tl.zeros((P, K), tl.float32)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        valid = n < last
        ok = valid[:, None] & (d < D)
        at = n.to(tl.int64)[:, None]
        absent = absent_channel(MAP, D, P) if WEIGHTED else absent_value(MAP)
        x = tl.load(k + at * k_n + d, mask=ok, other=absent).to(tl.float32)
        value = tl.load(v + at * v_n + d, mask=ok, other=0.0)
        f = key_feature(x, power, inverse, MAP, EXACT)
        if WEIGHTED:
            score = tl.where(valid, tl.sum(f * query, 1), -float("inf"))
            higher = tl.maximum(maximum, tl.max(score, 0))
            shrink = shrinkage(maximum, higher, EXACT)
            weight = exponential(tl.where(valid, score - higher, -1e4), EXACT)
            maximum = higher
            mass = mass * shrink + weight
            f *= weight[:, None]
            key_sum = key_sum * shrink + fold(f, FOLD)
            state *= shrink
        else:
            key_sum += fold(f, FOLD)
        if MEAN_VALUE:
            value_sum += fold(value.to(tl.float32), FOLD)
        if ROTARY:
            cosine, sine = angles(
                rows, columns, n, last, width, reciprocal, shift, row_stride, column_stride,
                D, P, True,
            )  # fmt: skip
            f = rotate(f, cosine, sine)
        if not WEIGHTED:
            # The gradient of a nearly one-hot softmax subtracts what is here from the same of f.
            f = rounded(f, v.dtype.element_ty)
        # The state is computed transposed: the tensor cores read v^T from where it was loaded.
        state = dot(tl.trans(operand(value, IEEE)), f, state, IEEE)

    row = tl.arange(0, K)
    column = tl.arange(0, P)
    parts += (bh.to(tl.int64) * tl.num_programs(1) + split) * (K * P + K + 2 * P)
    tl.store(parts + row[None, :] * P + column[:, None], state)
    parts += K * P
    tl.store(parts + row, tl.sum(key_sum, 0))
    if MEAN_VALUE:
        tl.store(parts + K + column, tl.sum(value_sum, 0))
    if WEIGHTED:
        tl.store(parts + K + P, maximum)
        tl.store(parts + K + P + 1, tl.sum(mass, 0))


@triton.jit(do_not_specialize=SCALARS)
def merge(
    parts, query_parts, total, state, tokens, splits, query_splits, scale,
    P: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    WEIGHTED: tl.constexpr, MEAN_VALUE: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Sum the splits' partial states: ROWS rows, of P floats, of one head per program.

    Forward divides by the softmax's sum (or by N); backward sums alone, and leaves in the last
    two rows the pieces of <S, dS> + <mean k, d mean k>, which the softmax's gradient subtracts.
    """
    scale = single(scale)
    bh = tl.program_id(0)
    block = tl.program_id(1)
    size: tl.constexpr = K * P + K + 2 * P
    full: tl.constexpr = K * P + 2 * K + 2 * P
    softmax_at: tl.constexpr = K * P + K + P
    key_rows: tl.constexpr = K + K // P
    parts += bh.to(tl.int64) * splits * size
    total += bh.to(tl.int64) * full
    chunk = tl.arange(0, CHUNK)
    column = tl.arange(0, P)
    row = block * ROWS + tl.arange(0, ROWS)
    is_value = row == key_rows
    is_key = row < key_rows
    live = row < key_rows + 1 if MEAN_VALUE else is_key

    maximum = 0.0
    mass = 0.0
    if WEIGHTED:
        maxima = tl.full((CHUNK,), -float("inf"), tl.float32)
        for start in range(0, splits, CHUNK):
            pointers = parts + (start + chunk) * size + softmax_at
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
            pointers = parts + here * size + softmax_at
            factor = shrinkage(tl.load(pointers, mask=valid, other=-float("inf")), maximum, True)
            masses += factor * tl.load(pointers + 1, mask=valid, other=0.0)
            tile *= tl.where(is_value[None, :], 1.0, factor[:, None])[:, :, None]
        result += tl.sum(tile, 0)
    if not BACKWARD:
        if WEIGHTED:
            mass = tl.sum(masses, 0)
            result /= tl.where(is_value, tl.cast(tokens, tl.float32), mass)[:, None]
        else:
            result /= tl.cast(tokens, tl.float32)
    pointers = row[:, None] * P + column[None, :]
    tl.store(total + pointers, result, mask=(row < key_rows + 1)[:, None])
    if BACKWARD:
        forward = tl.load(
            state + bh.to(tl.int64) * full + pointers, mask=is_key[:, None], other=0.0
        )
        inner = tl.sum(tl.sum(tl.where(is_key[:, None], result * forward, 0.0), 1), 0)
        tl.store(total + softmax_at + block, inner)
    elif block == 0:
        key = tl.arange(0, K)
        query = tl.zeros((K,), tl.float32)
        if WEIGHTED:
            query += sum_splits(query_parts + bh.to(tl.int64) * query_splits * K, query_splits, K)
        tl.store(total + softmax_at + key, query * (scale / tokens))
        softmax = tl.where(column == 0, maximum, tl.where(column == 1, mass, 0.0))
        tl.store(total + softmax_at + K + column, softmax)


@triton.jit(do_not_specialize=SCALARS)
def _read(
    q, rows, columns, local, gate, state, out,
    q_b, q_n, q_h, l_b, l_n, l_h, g_b, g_n, g_h, o_b, o_n, o_h,
    tokens, per_split, heads, width, reciprocal, shift, row_stride, column_stride, scale,
    D: tl.constexpr, P: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr, READOUT: tl.constexpr, MEAN_VALUE: tl.constexpr,
    ROTARY: tl.constexpr, LOCAL: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    scale = single(scale)
    bh = tl.program_id(0)
    split = tl.program_id(1)
    EXACT: tl.constexpr = out.dtype.element_ty == tl.float32
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    q += b * q_b + h * q_h
    out += b * o_b + h * o_h
    if LOCAL:
        local += b * l_b + h * l_h
    if GATE:
        gate += b * g_b + h * g_h
    d = tl.arange(0, P)[None, :]
    e = tl.arange(0, K)
    power, inverse = channel_parameters(rows, columns, h, d, D, MAP)
    state += bh.to(tl.int64) * (K * P + 2 * K + 2 * P)
    s = tl.load(state + state_row(e[:, None], d, D, READOUT) * P + d)
    s_high = high_part(s, EXACT)
    s_low = low_part(s, EXACT)
    if READOUT == "polarized":
        means = load_means(state + K * P, K)
        means_high = high_part(means, EXACT)
        means_low = low_part(means, EXACT)
    else:
        key = tl.load(state + K * P + e[None, :])
    if MEAN_VALUE:
        mean_value = tl.load(state + K * P + K + d)
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        ok = (n < last)[:, None] & (d < D)
        at = n.to(tl.int64)[:, None]
        x = tl.load(q + at * q_n + d, mask=ok, other=absent_channel(MAP, D, P)).to(tl.float32)
        # These loads start long before they are used, so that the arithmetic hides their latency.
        if LOCAL:
            branch = tl.load(local + at * l_n + d, mask=ok, other=0.0)
        if GATE:
            factor = tl.load(gate + at * g_n + d, mask=ok, other=0.0)
        f = query_feature(x, power, inverse, MAP, EXACT)
        if READOUT == "polarized":
            a, b_ = polarized_factors(f, means_high, means_low, EXACT)
            a = tl.where(d < D // 2, a[:, None], b_[:, None])
        else:
            a, b_, _, _ = readout_factors(tl.sum(f * key, 1), tokens, scale, READOUT)
            a = a[:, None]
        if ROTARY:
            cosine, sine = angles(
                rows, columns, n, last, width, reciprocal, shift, row_stride, column_stride,
                D, P, True,
            )  # fmt: skip
            f = rotate(f, cosine, sine)
        if not MEAN_VALUE:  # which is subtracted, from nearly the same
            f = rounded(f, out.dtype.element_ty)
        y = dot_halves(f, s_high, s_low, tl.zeros((BLOCK, P), tl.float32), EXACT) * a
        if MEAN_VALUE:
            y += b_[:, None] * mean_value
        if LOCAL:
            y += branch.to(tl.float32)
        if GATE:
            y *= factor.to(tl.float32)
        tl.store(out + at * o_n + d, y.to(out.dtype.element_ty), mask=ok)


def or_else(x: Tensor | None, other: Tensor) -> Tensor:
    """`x`, or a tensor that stands in its place and is not read."""
    return other if x is None else x


def strides_of(x: Tensor | None) -> tuple[int, ...]:
    """The strides of image, token and head."""
    return (0, 0, 0) if x is None else x.stride()[:3]


def contiguous_tables(
    rows: Tensor | None, columns: Tensor | None, other: Tensor
) -> tuple[Tensor, Tensor]:
    """The tables of a rotation or of channels in float32; without them, tensors not to be read."""
    if rows is None:
        return other, other
    return rows.float().contiguous(), columns.float().contiguous()


def forward(
    how: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    local: Tensor | None,
    gate: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Write the result to `out`; return the state that `backward` needs."""
    rows, columns = contiguous_tables(rows, columns, query)
    parts = how.empty(query, how.rows, how.state.grid[1], *how.part_shape)
    query_parts = parts
    if how.is_weighted:
        query_parts = how.empty(query, how.rows, how.query_sums.grid[1], how.features)
        launch(_query_sums, how.query_sums, query, query_parts, *strides_of(query))
    launch(
        _state, how.state,
        key, value, rows, columns, query_parts, parts, *strides_of(key), *strides_of(value),
    )  # fmt: skip
    state = how.empty(query, *how.state_shape)
    launch(merge, how.merge, parts, query_parts, state, state)
    launch(
        _read, how.read,
        query, rows, columns, or_else(local, query), or_else(gate, query), state, out,
        *strides_of(query), *strides_of(local), *strides_of(gate), *strides_of(out),
    )  # fmt: skip
    return state
