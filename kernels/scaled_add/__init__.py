"""The residual sum with a layer scale and stochastic depth, in one pass.

PyTorch multiplies and adds one after the other, and keeps or makes again a map of the product.
Here the sum is one kernel forward and one backward. A compiler sees the reference.
"""

from torch import Tensor

from ..runtime.dispatch import (
    WIDEST_ROW,
    check_factors,
    check_vectors,
    is_direct_call,
    runs_triton,
)
from . import operator, reference


def scaled_add(
    x: Tensor, branch: Tensor, scale: Tensor | None, keep: Tensor | None = None
) -> Tensor:
    """x + keep * scale * branch, with a scale per channel and a factor per image.

    Args:
        x, branch: (..., C), of one shape, each float32, float64, float16 or bfloat16.
        scale: (C,), any floating dtype, a layer scale (arXiv:2103.17239), or None for 1.
        keep: (B, 1, ..., 1), as many axes as `x`: 0 or 1 / (1 - p) for each image under stochastic
            depth (arXiv:1603.09382), or None for 1. It gets no gradient.

    Returns:
        (..., C) in the dtype of `x`, under autocast too; the sum is computed in float32 or wider
        and rounded once.

    Raises:
        ValueError: if shapes disagree.
    """
    if branch.shape != x.shape:
        raise ValueError(f"branch has shape {tuple(branch.shape)}, expected {tuple(x.shape)}")
    check_vectors(x.shape[-1], scale=scale)
    if keep is not None:
        check_factors(x.shape, keep=keep)
    args = (x, branch, scale, keep)
    if x.shape[-1] > WIDEST_ROW or not runs_triton(x) or not is_direct_call(args, "scaled_add"):
        return reference.scaled_add(*args)
    return operator.scaled_add(*args)
