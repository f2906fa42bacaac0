"""Linear attention between binary codes, to which queries are hashed (EcoFormer)."""

from torch import Tensor

from ..runtime.dispatch import runs_triton, state_fits
from . import operator, reference

# The most anchors, and bits of a code, that the backward pass has shared memory for on GPUs whose
# programs have 99 KiB.
MOST_ANCHORS = MOST_BITS = 32


def hash_attention(
    query: Tensor, value: Tensor, anchors: Tensor, means: Tensor, hyperplanes: Tensor
) -> Tensor:
    """Linear attention between codes of b bits, which queries and keys share.

    Per head, with u_i the query of token i divided by its length, m anchors a_j and s the mean of
    all squared distances |u_i - a_j|^2 in the image (EcoFormer, arXiv:2209.09004),

        c_i = sign(A (exp(-|u_i - a_j|^2 / (2 s)) - mean_j)_j)
        y_i = (c_i sum_j c_j^T v_j + (b + 1) v_i) / (c_i . sum_j c_j + N (b + 1))

    where A are the hyperplanes. In the backward pass a sign has the gradient of the identity where
    its argument is within -1 and 1. Anchors, means and hyperplanes are constants.

    Args:
        query, value: (B, N, heads, D), one dtype: float32, float64, float16 or bfloat16. Any
            strides with the last axis contiguous. On CUDA, float64, heads wider than 128 (64 on
            GPUs whose programs have 99 KiB of shared memory), more than 32 anchors and codes longer
            than 32 bits run the reference.
        anchors: (heads, m, D), any floating dtype.
        means: (heads, m), those of the kernel's values.
        hyperplanes: A, (heads, b, m).

    Returns:
        (B, N, heads, D) contiguous, in the dtype of `query`; computed in float32 or wider.

    Raises:
        ValueError: if shapes or dtypes disagree.
    """
    if query.ndim != 4:
        raise ValueError(f"query has shape {tuple(query.shape)}, expected (B, N, heads, D)")
    if (value.shape, value.dtype) != (query.shape, query.dtype):
        raise ValueError(
            f"value is {value.dtype} of shape {tuple(value.shape)}, expected {query.dtype} of "
            f"shape {tuple(query.shape)} as query is"
        )
    heads, width = query.shape[2:]
    number, bits = anchors.shape[1], hyperplanes.shape[1]
    for name, x, shape in (
        ("anchors", anchors, (heads, number, width)),
        ("means", means, (heads, number)),
        ("hyperplanes", hyperplanes, (heads, bits, number)),
    ):
        if x.shape != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {shape}")
    fits = number <= MOST_ANCHORS and bits <= MOST_BITS and state_fits(width, query.device)
    if not (fits and runs_triton(query)):
        return reference.hash_attention(query, value, anchors, means, hyperplanes)
    return operator.hash_attention(query, value, anchors, means, hyperplanes)[0]
