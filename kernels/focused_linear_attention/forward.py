"""The Triton kernel of the focused power map: queries and keys in one launch."""

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.dispatch import rows_contiguous
from ..runtime.launch import launch
from .mathematics import divisor, powers_of
from .plan import plan


@triton.jit(do_not_specialize=["count"])
def _forward(
    q, k, scale, fq, fk, q_n, k_n, count,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        x, out, x_n = q, fq, q_n
    else:
        x, out, x_n = k, fk, k_n
    row = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, P)[None, :]
    live = c < C
    inverse = divisor(scale, c, live)
    for tile in tl.range(tl.program_id(0), tl.cdiv(count, ROWS), tl.num_programs(0)):
        n = (tile * ROWS + row).to(tl.int64)
        ok = (n < count) & live
        value = tl.load(x + n * x_n + c, mask=ok, other=0.0).to(tl.float32)
        _, powers, _, _, norm = powers_of(value, inverse, POWER)
        tl.store(out + n * C + c, (norm[:, None] * powers).to(out.dtype.element_ty), mask=ok)


def flatten_tokens(x: Tensor) -> Tensor:
    """`x` (B, N, heads, D) as (B * N, C): a view wherever one stride leads from token to token."""
    return rows_contiguous(x.reshape(-1, x.shape[2] * x.shape[3]))


def forward(
    query: Tensor, key: Tensor, scale: Tensor, power: int, fquery: Tensor, fkey: Tensor
) -> None:
    """Write the features of query and key to `fquery` and `fkey`."""
    query, key = flatten_tokens(query), flatten_tokens(key)
    how = plan(scale.numel(), len(query), query.stride(0), key.stride(0), power, query.device)
    launch(_forward, how.forward, query, key, scale.contiguous(), fquery, fkey)
