"""The forward kernel of `attention_of_parts`; `plan.py` has the order of all."""

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from ..runtime.mathematics import multiply, single
from .mathematics import SCALARS, load_keys, softmax_of
from .plan import plan


@triton.jit(do_not_specialize=SCALARS)
def _attend(
    q, first, first_local, second, second_local, out,
    q_b, q_n, o_b, o_n, tokens, per_split, keys, heads, scale,
    SHARES: tl.constexpr, D: tl.constexpr, P: tl.constexpr, KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    scale = single(scale)
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    share = tl.program_id(0) % SHARES
    h = tl.program_id(0) // SHARES % heads
    b = (tl.program_id(0) // SHARES // heads).to(tl.int64)
    q += b * q_b + (h * SHARES + share) * D
    out += b * o_b + (share * heads + h) * D
    if share > 0:
        first = second
        first_local = second_local
    k, v, known = load_keys(first, first_local, b, h, keys, heads, D, P, KEYS)
    d = tl.arange(0, P)[None, :]
    start = tl.program_id(1) * per_split
    last = tl.minimum(start + per_split, tokens)
    for block in range(start, last, BLOCK):
        n = block + tl.arange(0, BLOCK)
        ok = (n < last)[:, None] & (d < D)
        at = n.to(tl.int64)[:, None]
        x = tl.load(q + at * q_n + d, mask=ok, other=0.0)
        weight, mass = softmax_of(x, k, known, scale, EXACT)
        y = multiply(weight.to(v.dtype), v) / mass
        tl.store(out + at * o_n + d, y.to(out.dtype.element_ty), mask=ok)


def forward(query: Tensor, parts: list[Tensor], out: Tensor) -> None:
    """Write the result to `out`; `parts` are keys and values, and what is added, of each share."""
    how = plan(query.shape, len(parts) // 2, parts[1].shape, query.dtype, query.device)
    launch(
        _attend, how.attend,
        query, *parts[:2], *parts[-2:], out, *query.stride()[:2], *out.stride()[:2],
    )  # fmt: skip
