"""Flow attention (Flowformer): linear attention whose flows between tokens are conserved.

Its four sums over tokens follow one from another, so that it reads q and k three times; a program
takes as many heads at once as make a row of channels that memory reads whole.
"""

from torch import Tensor

from ..linear_attention import check_tensors
from ..runtime.dispatch import runs_triton, state_fits
from . import operator, reference


def flow_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Linear attention in which tokens compete as sources and are allocated as sinks.

    Per head, with q and k behind a sigmoid and flow(x, t) = (x + e) . (t + e) + e, e = 1e-6,
    token i as a sink takes in 1 / I_i = flow(q_i, sum_j k_j), and token j as a source gives out
    1 / O_j = flow(k_j, sum_i q_i). Where each source gives out one unit, sink i takes in
    a_i = flow(q_i, sum_j O_j k_j); where each sink takes in one, source j gives out
    c_j = flow(k_j, sum_i I_i q_i), cut off at 1. Then (Flowformer, arXiv:2202.06258, section 3.2)

        y_i = sigmoid(a_i) I_i q_i sum_j k_j^T v_j N softmax_j(c_j)

    Args:
        query, key, value: (B, N, heads, D), one dtype: float32, float64, float16 or bfloat16. Any
            strides with the last axis contiguous; a packed projection, in which the heads of a
            token lie side by side, is read in place. On CUDA, float64 and heads wider than 128 (64
            on GPUs whose programs have 99 KiB of shared memory) run the reference.

    Returns:
        (B, N, heads, D) contiguous, in the dtype of `query`; sums are in float32 or wider.

    Raises:
        ValueError: if shapes or dtypes disagree.
    """
    check_tensors(query, key, value, None, None)
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise ValueError(f"{name} is {x.dtype}, expected {query.dtype} as query is")
    if not (state_fits(query.shape[3], query.device) and runs_triton(query)):
        return reference.flow_attention(query, key, value)
    return operator.flow_attention(query, key, value)[0]
