"""Layer normalisation, alone or fused with the residual sum before it, and that about zero.

Under autocast PyTorch normalises in float32 and gives float32, so a block's norms and sums move
two to three times the bytes of its products. Here they are one pass: sums are in float32, what
is read and written stays in the dtype of `x`. A compiler sees the reference, which it fuses
with what stands around it.
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


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last axis (arXiv:1607.06450).

    Args:
        x: (..., C), float32, float64, float16 or bfloat16.
        weight, bias: (C,), any floating dtype.
        eps: added to the variance.

    Returns:
        (..., C) in the dtype of `x`, under autocast too; computed in float32 or wider.

    Raises:
        ValueError: if shapes disagree.
    """
    check_vectors(x.shape[-1], weight=weight, bias=bias)
    args = (x, weight, bias, eps)
    if x.shape[-1] > WIDEST_ROW or not runs_triton(x) or not is_direct_call(args, "layer_norm"):
        return reference.layer_norm(*args)
    return operator.layer_norm(*args)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv:1910.07467).

    Args:
        x: (..., C), float32, float64, float16 or bfloat16. A slice of a packed projection is read
            in place.
        weight: (C,), any floating dtype.
        eps: added to the mean square.

    Returns:
        (..., C) in the dtype of `x`, under autocast too; computed in float32 or wider.

    Raises:
        ValueError: if shapes disagree.
    """
    check_vectors(x.shape[-1], weight=weight)
    args = (x, weight, eps)
    if x.shape[-1] > WIDEST_ROW or not runs_triton(x) or not is_direct_call(args, "layer_norm"):
        return reference.rms_norm(*args)
    return operator.rms_norm(*args)


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
    keep: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The residual sum s = x + keep * scale * branch, and `layer_norm` of it.

    Args:
        x, branch: (..., C), of one shape, each of any floating dtype.
        weight, bias: (C,), of the norm.
        scale: (C,), a layer scale (arXiv:2103.17239), or None for 1.
        keep: (B, 1, ..., 1), the factor of each image under stochastic depth, or None for 1, as of
            :func:`~linsight.kernels.scaled_add.scaled_add`.
        eps: added to the variance.

    Returns:
        s and its norm, (..., C), both in the dtype of `x`, under autocast too; s is rounded to it
        before it is normalised.

    Raises:
        ValueError: if shapes disagree.
    """
    if branch.shape != x.shape:
        raise ValueError(f"branch has shape {tuple(branch.shape)}, expected {tuple(x.shape)}")
    check_vectors(x.shape[-1], scale=scale, weight=weight, bias=bias)
    if keep is not None:
        check_factors(x.shape, keep=keep)
    args = (x, branch, scale, keep, weight, bias, eps)
    if x.shape[-1] > WIDEST_ROW or not runs_triton(x) or not is_direct_call(args, "layer_norm"):
        return reference.add_layer_norm(*args)
    return operator.add_layer_norm(*args)
