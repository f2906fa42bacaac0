"""The forward kernels of `flow_attention`; `plan.py` has their order."""

import triton
import triton.language as tl
from torch import Tensor

from ..linear_attention.mathematics import sum_splits
from ..runtime.dispatch import rows_contiguous
from ..runtime.launch import launch
from ..runtime.mathematics import (
    dot,
    dot_halves,
    exponential,
    fold,
    high_part,
    low_part,
    operand,
    sum_rows,
)
from .mathematics import (
    ABSENT,
    SCALARS,
    flow,
    join_heads,
    load_blocks,
    locate,
    once,
    prepare_flow,
    sigmoid,
    split_heads,
    spread,
)
from .plan import plan


@triton.jit(do_not_specialize=SCALARS)
def _token_sums(
    q, k, parts, q_b, q_n, k_b, k_n,
    tokens, per_split, heads,
    D: tl.constexpr, W: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """sum q and sum k of this program's tokens."""
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    b, d, live = locate(heads, D, W, P)
    q += b * q_b
    k += b * k_b
    split = tl.program_id(1)
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    query_sum = tl.zeros((FOLD, P), tl.float32)
    key_sum = tl.zeros((FOLD, P), tl.float32)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        ok = (n < last)[:, None] & live
        at = n.to(tl.int64)[:, None]
        query = tl.load(q + at * q_n + d, mask=ok, other=ABSENT)
        key = tl.load(k + at * k_n + d, mask=ok, other=ABSENT)
        query_sum += fold(sigmoid(query, EXACT), FOLD)
        key_sum += fold(sigmoid(key, EXACT), FOLD)
    splits = tl.num_programs(1)
    parts += (tl.program_id(0).to(tl.int64) * 2 * splits + split) * P + tl.arange(0, P)
    tl.store(parts, tl.sum(query_sum, 0))
    tl.store(parts + splits * P, tl.sum(key_sum, 0))


@triton.jit(do_not_specialize=SCALARS)
def _flow_sums(
    q, k, token_parts, state, parts, q_b, q_n, k_b, k_n,
    tokens, per_split, heads, splits,
    D: tl.constexpr, W: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """sum O k and sum I q of this program's tokens."""
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    b, d, live = locate(heads, D, W, P)
    q += b * q_b
    k += b * k_b
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    c = tl.arange(0, P)
    token_parts += row * 2 * splits * P
    query_sum = sum_splits(token_parts, splits, P)
    key_sum = sum_splits(token_parts + splits * P, splits, P)
    if split == 0:
        state += row * (W + 5) * P + W * P + P
        tl.store(state + c, query_sum)
        tl.store(state + P + c, key_sum)
    queries, least_out = prepare_flow(query_sum[None, :], live, W)
    keys, least_in = prepare_flow(key_sum[None, :], live, W)
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    source_sum = tl.zeros((FOLD, P), tl.float32)
    sink_sum = tl.zeros((FOLD, P), tl.float32)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        ok = (n < last)[:, None] & live
        at = n.to(tl.int64)[:, None]
        query = tl.load(q + at * q_n + d, mask=ok, other=ABSENT)
        key = tl.load(k + at * k_n + d, mask=ok, other=ABSENT)
        key = split_heads(sigmoid(key, EXACT), W)
        query = split_heads(sigmoid(query, EXACT), W)
        outgoing = 1.0 / flow(key, queries, least_out)
        incoming = 1.0 / flow(query, keys, least_in)
        source_sum += fold(join_heads(key * outgoing[:, :, None]), FOLD)
        sink_sum += fold(join_heads(query * incoming[:, :, None]), FOLD)
    count = tl.num_programs(1)
    parts += (row * 2 * count + split) * P + c
    tl.store(parts, tl.sum(source_sum, 0))
    tl.store(parts + count * P, tl.sum(sink_sum, 0))


@triton.jit(do_not_specialize=SCALARS)
def _state(
    k, v, flow_parts, state, parts, k_b, k_n, v_b, v_n,
    tokens, per_split, heads, splits,
    D: tl.constexpr, W: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum exp(c) k^T v and sum exp(c) of this program's tokens."""
    EXACT: tl.constexpr = k.dtype.element_ty == tl.float32
    b, d, live = locate(heads, D, W, P)
    k += b * k_b
    v += b * v_b
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    c = tl.arange(0, P)
    sink_sum = sum_splits(flow_parts + (row * 2 + 1) * splits * P, splits, P)
    if split == 0:
        tl.store(state + row * (W + 5) * P + W * P + 4 * P + c, sink_sum)
    sinks, least = prepare_flow(sink_sum[None, :], live, W)
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    mass = tl.zeros((BLOCK, P // W), tl.float32)
    total = tl.zeros((P, P), tl.float32)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        valid = (n < last)[:, None]
        ok = valid & live
        at = n.to(tl.int64)[:, None]
        key = tl.load(k + at * k_n + d, mask=ok, other=ABSENT)
        value = operand(tl.load(v + at * v_n + d, mask=ok, other=0.0), EXACT)
        key = split_heads(sigmoid(key, EXACT), W)
        # c is positive: of the authors' cut-offs at 1 and -1 the second one is never reached.
        conserved = tl.minimum(flow(key, sinks, least), 1.0)
        weight = tl.where(valid, exponential(conserved, EXACT), 0.0)
        mass += weight
        # The state is computed transposed: the tensor cores read v^T from where it was loaded.
        key = join_heads(key * weight[:, :, None])
        total = dot(tl.trans(value), key, total, EXACT)
    parts += (row * tl.num_programs(1) + split) * (W + 1) * P
    e = c[:, None]
    tl.store(parts + e % W * P + c[None, :], total, mask=e // W == c[None, :] // W)
    tl.store(parts + W * P + c, tl.sum(spread(mass, W), 0))


@triton.jit(do_not_specialize=SCALARS)
def merge(
    parts, total, splits,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum the splits' parts, of SIZE floats, of a group of heads: COLUMNS floats per program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = column < SIZE
    merged = sum_rows(parts + row * splits * SIZE, splits, SIZE, column, live, ROWS, COLUMNS)
    tl.store(total + row * STRIDE + column, merged, mask=live)


@triton.jit(do_not_specialize=SCALARS)
def _read(
    q, flow_parts, state, out, q_b, q_n, o_b, o_n,
    tokens, per_split, heads, splits,
    D: tl.constexpr, W: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = out.dtype.element_ty == tl.float32
    b, d, live = locate(heads, D, W, P)
    q += b * q_b
    out += b * o_b
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    c = tl.arange(0, P)
    state += row * (W + 5) * P
    source_sum = sum_splits(flow_parts + row * 2 * splits * P, splits, P)
    if split == 0:
        tl.store(state + W * P + 3 * P + c, source_sum)
    sources, least = prepare_flow(source_sum[None, :], live, W)
    keys, least_in = prepare_flow(tl.load(state + W * P + 2 * P + c[None, :]), live, W)
    s = load_blocks(state, c[:, None], c[None, :], W, P)
    s *= tokens / tl.load(state + W * P + c[:, None])
    s_high = high_part(s, EXACT)
    s_low = low_part(s, EXACT)
    first = split * per_split
    last = tl.minimum(first + per_split, tokens)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        ok = (n < last)[:, None] & live
        at = n.to(tl.int64)[:, None]
        query = tl.load(q + at * q_n + d, mask=ok, other=ABSENT)
        query = once(sigmoid(query, EXACT))
        heads_of = split_heads(query, W)
        allocated = sigmoid(flow(heads_of, sources, least), EXACT)
        factor = allocated / flow(heads_of, keys, least_in)
        y = dot_halves(query, s_high, s_low, tl.zeros((BLOCK, P), tl.float32), EXACT)
        y *= spread(factor, W)
        tl.store(out + at * o_n + d, y.to(out.dtype.element_ty), mask=ok)


def flatten_heads(x: Tensor) -> Tensor:
    """`x` (B, N, heads, D) as (B, N, C): a view where the heads of a token lie side by side."""
    return rows_contiguous(x.flatten(2))


def strides_of(x: Tensor) -> tuple[int, int]:
    """The strides of image and token."""
    return x.stride()[:2]


def forward(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> Tensor:
    """Write the result to `out`; return the state that `backward` needs."""
    how = plan(query.shape, query.dtype, query.device)
    query, key, value, out = map(flatten_heads, (query, key, value, out))
    queries, keys, values = map(strides_of, (query, key, value))
    token_parts = how.empty(query, 2, how.token_sums.grid[1])
    launch(_token_sums, how.token_sums, query, key, token_parts, *queries, *keys)
    state = how.empty(query, how.padded + 5)
    flow_parts = how.empty(query, 2, how.flow_sums.grid[1])
    launch(_flow_sums, how.flow_sums, query, key, token_parts, state, flow_parts, *queries, *keys)
    parts = how.empty(query, how.state.grid[1], how.padded + 1)
    launch(_state, how.state, key, value, flow_parts, state, parts, *keys, *values)
    launch(merge, how.merge, parts, state)
    launch(_read, how.read, query, flow_parts, state, out, *queries, *strides_of(out))
    return state
