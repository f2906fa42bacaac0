"""Linear attention with a state per square of the map, and a matrix that mixes the states (MHLA).

The squares of one map are many states: those of mhla_deit_small at 256 pixels are nearly 3 times as
large in float32 as its queries, keys and values are in bfloat16. So on maps of so few tokens the
kernels form no state, and take the products in the other order, pair by pair; see
docs/performance.md.
"""

from math import isqrt

import torch
from torch import Tensor

from ..linear_attention import check_tensors
from ..runtime.dispatch import runs_triton, state_fits
from . import operator, reference

# Pairs of tokens whose products take as long as it takes to write, mix and read a row of a state:
# 7 D operations forward at 300 TFLOP/s, and 16 D bytes at 3 TB/s, doubled for the launches.
PAIRS_PER_STATE_ROW = 512
# The widest head in float16, whose operands are split into three products, for which a GPU of
# compute capability 10 has tensor memory by pairs.
WIDEST_HALF_PAIRS = 32
# Where a token lies is found by products of 30 bits.
MOST_TRITON_TOKENS = 1 << 15
MOST_TRITON_SQUARES = 64


def mixed_state_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    size: tuple[int, int],
    *,
    local: Tensor | None = None,
    prefix_tokens: int = 0,
) -> Tensor:
    """Linear attention whose states, one per square of the map, are mixed (arXiv:2601.07832).

    With phi(x) = relu(x) + 1e-6, for the token at place w of square i, per head,

        S_j = sum_w phi(k_jw)^T v_jw, n_j = sum_w phi(k_jw)      the states of square j
        z_iw = sum_j A_ij phi(q_jw) . n_j                        the normaliser
        y_iw = phi(q_iw) sum_j A_ij S_j / (z_iw + 1e-6) + local

    so that the normaliser mixes products of the queries at the same place of all squares, as the
    authors' code does. There are as many squares for any map. The sides of a map that they do not
    divide are rounded up; of tokens that are not there phi is zero.

    Prefix tokens, which the paper does not have, lie in no square and are near to all: their state
    is added to the mixed state of every square, and they read the sum of all states.

    Args:
        query, key, value: (B, P + H * W, heads, D), the prefix tokens and then the map in row-major
            order; float32, float64, float16 or bfloat16. Any strides with the last axis
            contiguous, so that a packed projection is read in place. On CUDA, float64, prefix
            tokens, more than 32768 tokens or 64 squares, and heads wider than 128 (64 on GPUs whose
            programs have 99 KiB of shared memory) run the reference.
        mixing: A, (M, M) for M = squares^2, any floating dtype; squares in row-major order.
        size: (H, W).
        local: (B, P + H * W, heads, D) added to the result.
        prefix_tokens: P.

    Returns:
        (B, P + H * W, heads, D) contiguous, in the dtype of `query`; sums are in float32 or wider.

    Raises:
        ValueError: if shapes disagree.
    """
    check_tensors(query, key, value, local, None)
    squares = isqrt(len(mixing))
    if not squares or mixing.shape != (squares**2, squares**2):
        raise ValueError(
            f"mixing has shape {tuple(mixing.shape)}, expected (M, M) with M a square number, the "
            "squares of the map"
        )
    tokens = query.shape[1]
    if prefix_tokens + size[0] * size[1] != tokens:
        raise ValueError(
            f"size is {tuple(size)} and prefix_tokens {prefix_tokens}, but query has {tokens} "
            "tokens"
        )
    if (
        prefix_tokens
        or squares**2 > MOST_TRITON_SQUARES
        or not state_fits(query.shape[3], query.device)
        or not runs_triton(query)
        or tokens > MOST_TRITON_TOKENS
    ):
        return reference.mixed_state_attention(
            query, key, value, mixing, size, local, prefix_tokens
        )
    width = query.shape[3]
    by_states = tokens**2 > PAIRS_PER_STATE_ROW * squares**2 * width or (
        query.dtype == torch.float16 and width > WIDEST_HALF_PAIRS
    )
    return operator.mixed_state_attention(query, key, value, mixing, local, *size, by_states)[0]
