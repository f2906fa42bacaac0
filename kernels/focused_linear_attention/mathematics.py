"""The focused power map in Triton: a token, of all its heads, lives in registers."""

import triton
import triton.language as tl

from ..runtime.mathematics import exponential

EPSILON = tl.constexpr(1e-6)


@triton.jit
def softplus(s):
    """log(1 + exp(s)), to rounding: exp(s) where that is small."""
    e = exponential(-tl.abs(s), True)
    one = 1.0 + e
    return tl.maximum(s, 0.0) + tl.where(one == 1.0, e, tl.log(one) * e / (one - 1.0 + 1e-30))


@triton.jit
def divisor(scale, c, live):
    """1 / softplus(s), zero beyond the last channel."""
    s = tl.load(scale + c, mask=live, other=0.0).to(tl.float32)
    return tl.where(live, 1.0 / softplus(s), 0.0)


@triton.jit
def powers_of(x, inverse, POWER: tl.constexpr):
    """t over its maximum, and that to the power p; the sums of their squares; and the norm of f
    over the norm of the second."""
    t = (tl.maximum(x, 0.0) + EPSILON) * inverse
    largest = tl.max(t, 1)
    t *= (1.0 / largest)[:, None]  # else powers and their squares leave the range of float32
    powers = t
    for _ in tl.static_range(POWER - 1):
        powers *= t
    square = tl.sum(t * t, 1)
    square_of_powers = tl.sum(powers * powers, 1)
    return t, powers, square, square_of_powers, largest * tl.sqrt(square / square_of_powers)
