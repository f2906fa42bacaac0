"""Attention through the Gaussian kernel and landmarks, without a softmax (SOFT)."""

import torch
from torch import Tensor

from ..runtime.dispatch import WIDEST_HEAD, runs_triton
from . import operator, reference


def gaussian_attention(
    query: Tensor,
    landmarks: Tensor,
    value: Tensor,
    inverse: Tensor,
    local: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> Tensor:
    """K inverse K^T v + local, per head, with K_ij = exp(-|scale q_i - l_j|^2 / 2), N x M.

    The softmax-free attention of SOFT (arXiv:2110.11945, eq. 9), where keys equal queries and
    `inverse` is that of the landmarks' own kernel (`landmark_kernel`, `newton_inverse`). K is
    never stored: its cost in memory is that of q and v.

    Args:
        query, value: (B, N, heads, D), one dtype: float32, float64, float16 or bfloat16. Any
            strides with the last axis contiguous. On CUDA, float64 and heads wider than 128 run
            the reference.
        landmarks: (B, M, heads, D), in the dtype of `query`.
        inverse: (B, heads, M, M), float32 or wider.
        local: (B, N, heads, D), added to the result, or None.
        scale: a factor of the queries alone; SOFT's is D^-1/4.

    Returns:
        (B, N, heads, D) contiguous, in the dtype of `query`; sums are in float32 or wider.

    Raises:
        ValueError: if shapes or dtypes disagree.
    """
    if query.ndim != 4:
        raise ValueError(f"query has shape {tuple(query.shape)}, expected (B, N, heads, D)")
    batch, _, heads, width = query.shape
    marks = landmarks.shape[1]
    for name, x, shape in (
        ("landmarks", landmarks, (batch, marks, heads, width)),
        ("value", value, tuple(query.shape)),
        ("inverse", inverse, (batch, heads, marks, marks)),
        ("local", local, tuple(query.shape)),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {shape}")
    for name, x in (("landmarks", landmarks), ("value", value)):
        if x.dtype != query.dtype:
            raise ValueError(f"{name} is {x.dtype}, but query is {query.dtype}: cast one of them")
    if inverse.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"inverse is {inverse.dtype}, expected float32: 16 bits cannot hold an inverse"
        )
    if width > WIDEST_HEAD or not runs_triton(query):
        return reference.gaussian_attention(query, landmarks, value, inverse, local, scale)
    return operator.gaussian_attention(query, landmarks, value, inverse, local, scale)[0]
