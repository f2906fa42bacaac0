"""What the kernels of `flow_attention` compute with: channels of several heads, sums of each.

A program has P channels of neighbouring heads, of which each is padded to W, a power of two: a
tensor (T, P) of tokens is (T, P / W, W) to a sum over each head. What there is one of per head,
(T, P / W), is computed once.
"""

import triton
import triton.language as tl

from ..runtime.mathematics import exponential, reciprocal_approximate

EPSILON = tl.constexpr(1e-6)
# What a missing token or channel is loaded as: its sigmoid is zero.
ABSENT = tl.constexpr(-1e4)

# Sizes that change from call to call and do not need other machine code.
SCALARS = ["tokens", "per_split", "heads", "splits"]


@triton.jit
def locate(heads, D: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """Of this program: its image; and of each of its channels, (1, P), the place in a token and
    whether there is one."""
    groups = tl.cdiv(heads, P // W)
    row = tl.program_id(0)
    c = tl.arange(0, P)[None, :]
    head = row % groups * (P // W) + c // W
    return (row // groups).to(tl.int64), head * D + c % W, (head < heads) & (c % W < D)


@triton.jit
def sigmoid(x, EXACT: tl.constexpr):
    x = x.to(tl.float32)
    if EXACT:
        # Beyond, the reduced argument of the exponential is one of rounding.
        x = tl.clamp(x, -1e4, 1e4, propagate_nan=tl.PropagateNan.ALL)
        return 1.0 / (1.0 + exponential(-x, True))
    else:
        return reciprocal_approximate(1.0 + exponential(-x, False))


@triton.jit
def once(x):
    """`x` (T, P), which the compiler computes once.

    It moves the change of layout in front of a product up to the load, through all but sums, and
    computes what is on its way a second time in the new layout. A sum of two that a thread holds,
    of which one is zero, is less than a sigmoid.
    """
    return tl.sum(tl.join(x, tl.zeros_like(x)), 2)


@triton.jit
def split_heads(x, W: tl.constexpr):
    """(T, P) to (T, P / W, W)."""
    return tl.reshape(x, (x.shape[0], x.shape[1] // W, W))


@triton.jit
def join_heads(x):
    """(T, P / W, W) to (T, P)."""
    return tl.reshape(x, (x.shape[0], x.shape[1] * x.shape[2]))


@triton.jit
def spread(x, W: tl.constexpr):
    """(T, P / W) to (T, P): to each channel what its head has."""
    return join_heads(tl.broadcast_to(x[:, :, None], (x.shape[0], x.shape[1], W)))


@triton.jit
def prepare_flow(total, live, W: tl.constexpr):
    """What `flow` to a total (1, P) is computed from: t + e by heads, and e (sum(t + e) + 1)."""
    total = split_heads(tl.where(live, total + EPSILON, 0.0), W)
    return total, EPSILON * (tl.sum(total, 2) + 1.0)


@triton.jit
def flow(x, total, least):
    """(x + e) . (t + e) + e of each head, (T, P / W), of x (T, P / W, W)."""
    return tl.sum(x * total, 2) + least


@triton.jit
def load_blocks(state, d, e, W: tl.constexpr, P: tl.constexpr):
    """Entries of the matrix, zero between different heads, of which `state` has the blocks."""
    return tl.load(state + e % W * P + d, mask=d // W == e // W, other=0.0)
