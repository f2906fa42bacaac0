"""The backward kernels of `linear_attention`; `plan.py` has their order."""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import MOST_SPLITS, launch
from ..runtime.mathematics import (
    dot,
    dot_halves,
    exponential,
    high_part,
    low_part,
    operand,
    rounded,
    single,
)
from .forward import contiguous_tables, merge, or_else, strides_of
from .mathematics import (
    SCALARS,
    absent_channel,
    absent_value,
    angles,
    as_columns,
    channel_parameters,
    first_columns,
    fold_sums,
    key_feature,
    key_feature_gradient,
    load_means,
    of_sign,
    polarized_factors,
    polarized_gradient,
    power_gradient,
    power_of,
    query_feature,
    query_feature_gradient,
    readout_factors,
    rotate,
    state_row,
    sum_splits,
)
from .plan import Plan

MOST_PARTS = tl.constexpr(MOST_SPLITS)


@triton.jit(do_not_specialize=SCALARS)
def _output_gradient(
    q, go, rows, columns, local, gate, state, parts, dlocal, dgate,
    q_b, q_n, q_h, go_b, go_n, go_h, l_b, l_n, l_h, g_b, g_n, g_h,
    dl_b, dl_n, dl_h, dg_b, dg_n, dg_h,
    tokens, per_split, heads, width, reciprocal, shift, row_stride, column_stride, scale,
    D: tl.constexpr, P: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr,
    READOUT: tl.constexpr, MEAN_VALUE: tl.constexpr, ROTARY: tl.constexpr,
    LOCAL: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    scale = single(scale)
    bh = tl.program_id(0)
    split = tl.program_id(1)
    EXACT: tl.constexpr = go.dtype.element_ty == tl.float32
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
        is_first = d < D // 2
    else:
        key = tl.load(state + K * P + e[None, :])
    if MEAN_VALUE:
        mean_value = tl.load(state + K * P + K + d)
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    if READOUT == "polarized":
        dmeans = tl.zeros((K, 16), tl.float32)
        dstate = tl.zeros((K, P), tl.float32)
    else:
        dkey_sum = tl.zeros((BLOCK // 2, K), tl.float32)
        dvalue_sum = tl.zeros((BLOCK // 2, P), tl.float32)
        dstate = tl.zeros((P, K), tl.float32)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        ok = (n < last)[:, None] & (d < D)
        at = n.to(tl.int64)[:, None]
        x = tl.load(q + at * q_n + d, mask=ok, other=absent_value(MAP)).to(tl.float32)
        grad = tl.load(go + at * go_n + d, mask=ok, other=0.0)
        if GATE:
            factor = tl.load(gate + at * g_n + d, mask=ok, other=0.0)
        if LOCAL:
            branch = tl.load(local + at * l_n + d, mask=ok, other=0.0)
        f = query_feature(x, power, inverse, MAP, EXACT)
        if READOUT == "polarized":
            first_a, second_a = polarized_factors(f, means_high, means_low, EXACT)
            a = tl.where(is_first, first_a[:, None], second_a[:, None])
        else:
            a, b_, da, db = readout_factors(tl.sum(f * key, 1), tokens, scale, READOUT)
        r = f
        if ROTARY:
            cosine, sine = angles(
                rows, columns, n, last, width, reciprocal, shift, row_stride, column_stride,
                D, P, True,
            )  # fmt: skip
            r = rotate(f, cosine, sine)
        # dy is rounded once, and the rounded value is used everywhere: the result is the exact
        # gradient of a slightly different dy, in which all terms that should cancel do.
        dy = (grad.to(tl.float32) * factor.to(tl.float32)).to(grad.dtype) if GATE else grad
        dy_operand = operand(dy, EXACT)
        dy = dy.to(tl.float32)
        if GATE or READOUT == "polarized":
            y = dot_halves(
                r if MEAN_VALUE else rounded(r, go.dtype.element_ty),
                s_high,
                s_low,
                tl.zeros((BLOCK, P), tl.float32),
                EXACT,
            )
            if READOUT == "polarized":
                y *= a
                dfirst = -first_a * tl.sum(tl.where(is_first, dy * y, 0.0), 1)
                dsecond = -second_a * tl.sum(tl.where(is_first, 0.0, dy * y), 1)
            else:
                dn = da * tl.sum(dy * y, 1)
                y *= a[:, None]
            if MEAN_VALUE:
                y += b_[:, None] * mean_value
            if LOCAL:
                y += branch.to(tl.float32)
            if GATE:
                tl.store(
                    dgate + at * dg_n + d,
                    (y * grad.to(tl.float32)).to(dgate.dtype.element_ty),
                    mask=ok,
                )
        else:
            t = dot_halves(
                dy_operand,
                tl.trans(s_high),
                tl.trans(s_low),
                tl.zeros((BLOCK, K), tl.float32),
                EXACT,
            )
            dn = da * tl.sum(r * t, 1)
        if LOCAL:
            tl.store(dlocal + at * dl_n + d, dy.to(dlocal.dtype.element_ty), mask=ok)
        if MEAN_VALUE:
            dn += db * tl.sum(dy * mean_value, 1)
            dvalue_sum += fold_sums(b_[:, None] * dy)
        if READOUT == "polarized":
            f = rounded(f, go.dtype.element_ty)
            dmeans = dot(tl.trans(f), as_columns(dfirst, dsecond), dmeans, EXACT)
            dstate = dot(tl.trans(f), rounded(dy * a, go.dtype.element_ty), dstate, EXACT)
        else:
            dkey_sum += fold_sums(dn[:, None] * f)
            r = rounded(r * a[:, None], go.dtype.element_ty)
            dstate = dot(tl.trans(dy_operand), r, dstate, EXACT)

    parts += (bh.to(tl.int64) * tl.num_programs(1) + split) * (K * P + K + 2 * P)
    if READOUT == "polarized":
        tl.store(parts + state_row(e[:, None], d, D, READOUT) * P + d, dstate)
        dmean, dother = first_columns(dmeans)
        positive, negative = tl.split(tl.reshape(dother, (P, 2)))
        dmean += tl.reshape(tl.join(negative, positive), (K,))
        tl.store(parts + K * P + e, dmean)
    else:
        tl.store(parts + e[None, :] * P + column[:, None], dstate)
        tl.store(parts + K * P + e, tl.sum(dkey_sum, 0))
    if MEAN_VALUE:
        tl.store(parts + K * P + K + column, tl.sum(dvalue_sum, 0))


@triton.jit
def _store_parameter_gradients(parts, bh, split, dpower, dscale):
    """This program's part (2, P) of the gradients of the map's parameters."""
    P: tl.constexpr = dpower.shape[1]
    parts += (bh.to(tl.int64) * tl.num_programs(1) + split) * (2 * P) + tl.arange(0, P)
    tl.store(parts, tl.sum(dpower, 0))
    tl.store(parts + P, tl.sum(dscale, 0))


@triton.jit(do_not_specialize=SCALARS)
def _key_gradient(
    k, v, rows, columns, state, dtotal, query_parts, excess, dk, dv,
    k_b, k_n, k_h, v_b, v_n, v_h, dk_b, dk_n, dk_h, dv_b, dv_n, dv_h,
    tokens, per_split, heads, width, reciprocal, shift, row_stride, column_stride,
    query_splits, pieces, scale,
    D: tl.constexpr, P: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr,
    WEIGHTED: tl.constexpr, ROTARY: tl.constexpr, MEAN_VALUE: tl.constexpr,
    ADD: tl.constexpr, MEASURE: tl.constexpr, CORRECT: tl.constexpr,
):  # fmt: skip
    """dk, dv and the partial sums of d mean q, or of the gradients of the map's parameters.

    A softmax that is nearly one-hot leaves of dp - sum(p dp) only roundings, unless the sum is
    of the very dp that it is taken from. So float32 and float16 first MEASURE, in a run that
    writes nothing else, by how much that sum exceeds <S, dS> + <mean k, d mean k>, and then
    CORRECT it. bfloat16 cannot tell.
    """
    scale = single(scale)
    bh = tl.program_id(0)
    split = tl.program_id(1)
    EXACT: tl.constexpr = v.dtype.element_ty == tl.float32
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    dk += b * dk_b + h * dk_h
    dv += b * dv_b + h * dv_h
    d = tl.arange(0, P)[None, :]
    e = tl.arange(0, K)
    power, inverse = channel_parameters(rows, columns, h, d, D, MAP)
    softmax_at: tl.constexpr = K * P + K + P
    state += bh.to(tl.int64) * (softmax_at + K + P)
    dtotal += bh.to(tl.int64) * (softmax_at + K + P)
    ds = tl.load(dtotal + e[:, None] * P + d)
    ds_high = high_part(ds, EXACT)
    ds_low = low_part(ds, EXACT)
    dkey = tl.load(dtotal + K * P + e[None, :])
    if MEAN_VALUE:
        dvalue = tl.load(dtotal + K * P + K + d) / tokens
    if WEIGHTED:
        query = tl.load(state + softmax_at + e[None, :])
        maximum = tl.load(state + softmax_at + K)
        inverse = 1.0 / tl.load(state + softmax_at + K + 1)
        piece = tl.arange(0, 2 * K)
        inner = tl.sum(tl.load(dtotal + softmax_at + piece, mask=piece < pieces, other=0.0), 0)
        if CORRECT:
            piece = tl.arange(0, MOST_PARTS)
            measured = excess + bh.to(tl.int64) * query_splits + piece
            inner += tl.sum(tl.load(measured, mask=piece < query_splits, other=0.0), 0)
        dquery_sum = tl.zeros((BLOCK // 2, K), tl.float32)
        excess_sum = tl.zeros((BLOCK,), tl.float32)
    else:
        weight = 1.0 / tokens
    if MAP == "signed_power":
        dpower = tl.zeros((BLOCK // 2, P), tl.float32)
        dscale = tl.zeros((BLOCK // 2, P), tl.float32)
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        valid = n < last
        ok = valid[:, None] & (d < D)
        at = n.to(tl.int64)[:, None]
        x = tl.load(k + at * k_n + d, mask=ok, other=absent_channel(MAP, D, P)).to(tl.float32)
        value = operand(tl.load(v + at * v_n + d, mask=ok, other=0.0), EXACT)
        f = key_feature(x, power, inverse, MAP, EXACT)
        r = f
        if ROTARY:
            cosine, sine = angles(
                rows, columns, n, last, width, reciprocal, shift, row_stride, column_stride,
                D, P, False,
            )  # fmt: skip
            r = rotate(f, cosine, sine)
        t = dot_halves(
            value, tl.trans(ds_high), tl.trans(ds_low), tl.zeros((BLOCK, K), tl.float32), EXACT
        )
        if ROTARY:
            t = rotate(t, cosine, -sine)
        t += dkey
        if WEIGHTED:
            score = tl.where(valid, tl.sum(f * query, 1) - maximum, -1e4)
            weight = exponential(score, EXACT) * inverse
            dscore = weight * (tl.sum(f * t, 1) - inner)
            t = t * weight[:, None] + dscore[:, None] * query
            excess_sum += tl.where(valid, dscore, 0.0)
            dquery_sum += fold_sums((dscore * scale)[:, None] * f)
        else:
            t *= weight
        if not MEASURE:
            if MAP == "signed_power":
                t, one_dpower, one_dscale = power_gradient(x, power, inverse, of_sign(x, t), EXACT)
                dpower += fold_sums(one_dpower)
                dscale += fold_sums(one_dscale)
            else:
                t = key_feature_gradient(x, f, t, MAP)
            tl.store(dk + at * dk_n + d, t.to(dk.dtype.element_ty), mask=ok)
            y = dot_halves(
                rounded(r, v.dtype.element_ty),
                ds_high,
                ds_low,
                tl.zeros((BLOCK, P), tl.float32),
                EXACT,
            )
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
            tl.store(query_parts + place * K + e, tl.sum(dquery_sum, 0))
    if MAP == "signed_power":
        _store_parameter_gradients(query_parts, bh, split, dpower, dscale)


@triton.jit(do_not_specialize=SCALARS)
def _query_gradient(
    q, go, rows, columns, gate, state, query_parts, dq,
    q_b, q_n, q_h, go_b, go_n, go_h, g_b, g_n, g_h, dq_b, dq_n, dq_h,
    tokens, per_split, heads, width, reciprocal, shift, row_stride, column_stride,
    query_splits, scale,
    D: tl.constexpr, P: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr,
    WEIGHTED: tl.constexpr, READOUT: tl.constexpr, MEAN_VALUE: tl.constexpr,
    ROTARY: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    scale = single(scale)
    bh = tl.program_id(0)
    split = tl.program_id(1)
    EXACT: tl.constexpr = go.dtype.element_ty == tl.float32
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    q += b * q_b + h * q_h
    go += b * go_b + h * go_h
    dq += b * dq_b + h * dq_h
    if GATE:
        gate += b * g_b + h * g_h
    column = tl.arange(0, P)
    d = column[None, :]
    e = tl.arange(0, K)[None, :]
    power, inverse = channel_parameters(rows, columns, h, d, D, MAP)
    state += bh.to(tl.int64) * (K * P + 2 * K + 2 * P)
    s = tl.load(state + state_row(e, column[:, None], D, READOUT) * P + column[:, None])
    s_high = high_part(s, EXACT)
    s_low = low_part(s, EXACT)
    if READOUT == "polarized":
        positive = tl.load(state + K * P + 2 * d)
        negative = tl.load(state + K * P + 2 * d + 1)
        dpower = tl.zeros((BLOCK // 2, P), tl.float32)
        dscale = tl.zeros((BLOCK // 2, P), tl.float32)
    else:
        key = tl.load(state + K * P + e)
    if MEAN_VALUE:
        mean_value = tl.load(state + K * P + K + d)
    if WEIGHTED:
        dquery = sum_splits(query_parts + bh.to(tl.int64) * query_splits * K, query_splits, K)
        dquery = (dquery / tokens)[None, :]
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        ok = (n < last)[:, None] & (d < D)
        at = n.to(tl.int64)[:, None]
        x = tl.load(q + at * q_n + d, mask=ok, other=absent_channel(MAP, D, P)).to(tl.float32)
        dy = tl.load(go + at * go_n + d, mask=ok, other=0.0)
        if GATE:
            factor = tl.load(gate + at * g_n + d, mask=ok, other=0.0).to(tl.float32)
            dy = (dy.to(tl.float32) * factor).to(dy.dtype)
        if READOUT == "polarized":
            f = power_of(x, power, inverse, EXACT)
            zeros = tl.zeros((BLOCK, K), tl.float32)
            of_first = operand(tl.where(d < D // 2, dy, 0.0).to(dy.dtype), EXACT)
            of_second = operand(tl.where(d < D // 2, 0.0, dy).to(dy.dtype), EXACT)
            t = of_sign(x, dot_halves(of_first, s_high, s_low, zeros, EXACT))
            t = polarized_gradient(f, t, tl.where(x > 0, positive, negative))
            u = of_sign(x, dot_halves(of_second, s_high, s_low, zeros, EXACT))
            t += polarized_gradient(f, u, tl.where(x > 0, negative, positive))
            t, one_dpower, one_dscale = power_gradient(x, power, inverse, t, EXACT)
            dpower += fold_sums(one_dpower)
            dscale += fold_sums(one_dscale)
        else:
            f = query_feature(x, power, inverse, MAP, EXACT)
            a, _, da, db = readout_factors(tl.sum(f * key, 1), tokens, scale, READOUT)
            dy_operand = operand(dy, EXACT)
            t = dot_halves(dy_operand, s_high, s_low, tl.zeros((BLOCK, K), tl.float32), EXACT)
            if ROTARY:
                cosine, sine = angles(
                    rows, columns, n, last, width, reciprocal, shift, row_stride, column_stride,
                    D, P, False,
                )  # fmt: skip
                t = rotate(t, cosine, -sine)
            # A rotation turned back on one factor of a product turns the other forth.
            dn = da * tl.sum(f * t, 1)
            if MEAN_VALUE:
                dn += db * tl.sum(dy.to(tl.float32) * mean_value, 1)
            t = t * a[:, None] + dn[:, None] * key
            if WEIGHTED:
                t += dquery
            t = query_feature_gradient(x, f, t, MAP, EXACT)
        tl.store(dq + at * dq_n + d, t.to(dq.dtype.element_ty), mask=ok)
    if READOUT == "polarized":
        _store_parameter_gradients(query_parts, bh, split, dpower, dscale)


def backward(
    how: Plan,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    local: Tensor | None,
    gate: Tensor | None,
    state: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    dlocal: Tensor | None,
    dgate: Tensor | None,
    between: Callable[[], None] | None = None,
    parts_of_parameters: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write every gradient.

    Args:
        between: runs once `dlocal` is complete. It leaves in `dvalue` what comes through the
            local branch; with a plan that was made with `add`, the gradient here is added to it.
        parts_of_parameters: of a map with parameters, the parts of their gradients that come
            through keys and through queries, for each program of `key_gradient` and of
            `query_gradient`.
    """
    rows, columns = contiguous_tables(rows, columns, query)
    parts = how.empty(query, how.rows, how.output_gradient.grid[1], *how.part_shape)
    outputs = (or_else(dlocal, query), or_else(dgate, query))
    launch(
        _output_gradient, how.output_gradient,
        query, grad, rows, columns, or_else(local, query), or_else(gate, query), state, parts,
        *outputs, *strides_of(query), *strides_of(grad), *strides_of(local), *strides_of(gate),
        *strides_of(dlocal), *strides_of(dgate),
    )  # fmt: skip
    dstate = how.empty(query, *how.state_shape)
    launch(merge, how.merge_gradient, parts, parts, dstate, state)
    if between is not None:
        between()
    splits = how.key_gradient.grid[1]
    if parts_of_parameters is None:
        key_parts = query_parts = how.empty(query, how.rows, splits, how.features)
    else:
        key_parts, query_parts = parts_of_parameters
    excess = how.empty(query, how.rows, splits)
    passes = (how.key_gradient_excess, how.key_gradient)
    for key_gradient in passes if how.is_corrected else passes[1:]:
        launch(
            _key_gradient, key_gradient,
            key, value, rows, columns, state, dstate, key_parts, excess, dkey, dvalue,
            *strides_of(key), *strides_of(value), *strides_of(dkey), *strides_of(dvalue),
        )  # fmt: skip
    if dlocal is not None:
        # The product grad * gate is there already: one tensor to read, not two.
        grad, gate = dlocal, None
    launch(
        _query_gradient, how.query_gradient,
        query, grad, rows, columns, or_else(gate, query), state, query_parts, dquery,
        *strides_of(query), *strides_of(grad), *strides_of(gate), *strides_of(dquery),
    )  # fmt: skip
