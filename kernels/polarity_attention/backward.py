"""The gradient of powers and scales, from what the kernels of `linear_attention` leave of it.

With t = |x / s|, f = t^p and g the gradient of f, that of p sums g f log t over tokens
and images, that of s sums -p g f / s: each program of `key_gradient` and of `query_gradient` has
summed g f log2 t and g f, of its tokens, into a part. The parts are summed here, in a fixed order.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from .plan import plan


@triton.jit
def _sum_parts(parts, batch, splits, column, P: tl.constexpr, ROWS: tl.constexpr):
    """The sum of `column` over the parts (batch, heads, splits, 2 P) of a head."""
    head = tl.program_id(0)
    heads = tl.num_programs(0)
    total = tl.zeros((ROWS, column.shape[0]), tl.float32)
    for start in range(0, batch * splits, ROWS):
        n = start + tl.arange(0, ROWS)
        row = (n // splits * heads + head) * splits + n % splits
        at = parts + row.to(tl.int64)[:, None] * (2 * P) + column[None, :]
        total += tl.load(at, mask=(n < batch * splits)[:, None], other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["batch", "key_splits", "query_splits"])
def _parameter_gradients(
    key_parts, query_parts, power, scale, dpower, dscale, batch, key_splits, query_splits,
    D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(2) * P + c
    total = _sum_parts(key_parts, batch, key_splits, column, P, ROWS)
    total += _sum_parts(query_parts, batch, query_splits, column, P, ROWS)
    at = tl.program_id(0) * D + c
    live = c < D
    if tl.program_id(2) == 0:
        total *= 0.6931471805599453
        tl.store(dpower + at, total.to(dpower.dtype.element_ty), mask=live)
    else:
        p = tl.load(power + at, mask=live, other=1.0).to(tl.float32)
        s = tl.load(scale + at, mask=live, other=1.0).to(tl.float32)
        tl.store(dscale + at, (-p / s * total).to(dscale.dtype.element_ty), mask=live)


def differentiate_parameters(
    key_parts: Tensor,
    query_parts: Tensor,
    power: Tensor,
    scale: Tensor,
    dpower: Tensor,
    dscale: Tensor,
) -> None:
    """Write the gradients of power and scale from the parts (batch * heads, splits, 2 P)."""
    heads, width = power.shape
    batch, padded = len(key_parts) // max(heads, 1), key_parts.shape[2] // 2
    how = plan(batch, heads, width, padded, (key_parts.shape[1], query_parts.shape[1]))
    power, scale = power.contiguous(), scale.contiguous()
    launch(_parameter_gradients, how, key_parts, query_parts, power, scale, dpower, dscale)
