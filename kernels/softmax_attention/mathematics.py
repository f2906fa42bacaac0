"""What the kernels of `attention_of_parts` compute with: keys, values, and the softmax."""

import triton
import triton.language as tl

from ..runtime.mathematics import exponential, multiply

SCALARS = ["tokens", "per_split", "keys", "heads", "splits"]
MASKED = tl.constexpr(-1e30)


@triton.jit
def load_keys(
    key_value, local, b, h, keys, heads, D: tl.constexpr, P: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """Keys, values and which of them there are: of one head, (KEYS, P) each."""
    m = tl.arange(0, KEYS)
    d = tl.arange(0, P)[None, :]
    ok = (m < keys)[:, None] & (d < D)
    row = ((b * keys + m) * heads + h)[:, None] * D
    key = tl.load(key_value + 2 * row + d, mask=ok, other=0.0)
    value = tl.load(key_value + 2 * row + D + d, mask=ok, other=0.0)
    value = value.to(tl.float32) + tl.load(local + row + d, mask=ok, other=0.0).to(tl.float32)
    return key, value.to(key.dtype), (m < keys)[None, :]


@triton.jit
def softmax_of(query, key, known, scale, EXACT: tl.constexpr):
    """exp(s - maximum) of queries to keys, and its sum."""
    score = tl.where(known, multiply(query, tl.trans(key)) * scale, MASKED)
    score -= tl.max(score, 1)[:, None]
    if EXACT:  # its exp takes no argument so small as the mask
        score = tl.maximum(score, -1e4, propagate_nan=tl.PropagateNan.ALL)
    weight = exponential(score, EXACT)
    return weight, tl.sum(weight, 1)[:, None]
