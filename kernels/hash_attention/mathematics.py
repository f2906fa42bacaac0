"""What the kernels of `hash_attention` compute with: directions, the kernel's values, codes."""

import triton
import triton.language as tl

from ..runtime.mathematics import exponential, high_part, low_part, multiply

SCALARS = ["tokens", "per_split", "heads"]
PASSED = tl.constexpr(4)


@triton.jit
def direction(x):
    """Each row divided by its length, and the inverse of the length; a row of zeros as it is."""
    square = tl.sum(x * x, 1)
    inverse = tl.where(square > 0, 1.0 / tl.sqrt_rn(square), 1.0)
    return x * inverse[:, None], inverse


@triton.jit
def load_anchors(
    anchors, h, D: tl.constexpr, P: tl.constexpr, ANCHORS: tl.constexpr, M: tl.constexpr
):
    """The anchors of a head, transposed, (P, M), and their squared lengths."""
    d = tl.arange(0, P)[:, None]
    m = tl.arange(0, M)[None, :]
    ok = (d < D) & (m < ANCHORS)
    a = tl.load(anchors + (h * ANCHORS + m) * D + d, mask=ok, other=0.0)
    return a, tl.sum(a * a, 0)


@triton.jit
def kernel_values(u, anchors, squares, mean):
    """Squared distances of directions to the anchors, and the kernel's values."""
    distance = 1.0 - 2.0 * multiply(u, anchors) + squares[None, :]
    return distance, exponential(distance * (-0.5 / mean), True)


@triton.jit
def load_code(codes, n, ok, CODE: tl.constexpr):
    """Codes as floats, and where the gradient passes."""
    bit = tl.arange(0, CODE)[None, :]
    kept = tl.load(codes + n.to(tl.int64)[:, None] * CODE + bit, mask=ok, other=0)
    passed = kept > 2
    return tl.where(passed, kept - PASSED, kept).to(tl.float32), passed


@triton.jit
def load_state(state, CODE: tl.constexpr, P: tl.constexpr, EXACT: tl.constexpr):
    """sum c^T v as high and low part (CODE, P), and sum c."""
    bit = tl.arange(0, CODE)
    s = tl.load(state + bit[:, None] * (P + 1) + tl.arange(0, P)[None, :])
    return high_part(s, EXACT), low_part(s, EXACT), tl.load(state + bit * (P + 1) + P)


@triton.jit
def as_operand(code, EXACT: tl.constexpr):
    """A code as an operand of products: -1, 0 and 1 are exact in bfloat16."""
    return code if EXACT else code.to(tl.bfloat16)
