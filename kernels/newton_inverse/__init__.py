"""The Newton-Schulz inverse of SOFT's landmark matrices, with each variant's own gradient."""

from typing import Literal, get_args

import torch
from torch import Tensor

from ..runtime.dispatch import runs_triton, without_autocast
from . import operator, reference

InverseMethod = Literal["regularized", "normalized", "unregularized"]
# Added to the diagonal by the regularised method.
RIDGE = 0.01


def newton_inverse(
    x: Tensor, *, method: InverseMethod = "regularized", iterations: int = 20
) -> Tensor:
    """The inverse of symmetric positive matrices by a fixed number of Newton-Schulz iterations.

    From V_0 = alpha P, V <- 2 V - V P V (SOFT, arXiv:2110.11945, algorithm 1). Where it has not
    converged the result is the last iterate, which SOFT's weights were trained with. With
    rho the largest row sum,

        regularized     P = x + 0.01 I, alpha = 1.8 / rho^2 of each matrix. The gradient is that
                        of an exact inverse, -V^T G V^T, and none goes through alpha.
        unregularized   P = x, alpha = 2 / rho^2 with rho over all matrices together, halved
                        up to ten times while a column of |I - x (alpha x)| of any of them sums
                        to more than 1.01; the gradient is the iteration's own, through alpha
                        too. SOFT's inverse of before July 2022.
        normalized      D V D with V as unregularized and D = diag(row sums of x)^-1/2:
                        SOFT-Norm (arXiv:2207.03341).

    Args:
        x: (..., M, M), float32 or float64, symmetric, without negative entries.
        method: one of the above.
        iterations: of Newton-Schulz.

    Returns:
        The shape and dtype of `x`. On CUDA float32 products keep float32's accuracy, whatever
        PyTorch's setting for TF32.

    Raises:
        ValueError: if a shape, a dtype or an option is out of range.
    """
    if x.ndim < 2 or x.shape[-1] != x.shape[-2]:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., M, M)")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x is {x.dtype}, expected float32: 16 bits cannot hold an inverse")
    if method not in get_args(InverseMethod):
        raise ValueError(
            f"method is {method!r}, expected one of {', '.join(get_args(InverseMethod))}"
        )
    if iterations < 0:
        raise ValueError(f"iterations is {iterations}, expected 0 or more")
    with without_autocast(x):
        return _inverse(x.flatten(0, -3) if x.ndim > 2 else x[None], method, iterations).view(
            x.shape
        )


def _inverse(x: Tensor, method: InverseMethod, iterations: int) -> Tensor:
    if x.shape[0] == 0:
        return x.clone()  # There is no largest sum of no matrices.
    steps = operator if runs_triton(x) else reference
    sums = x.sum(-1)
    if method == "regularized":
        alpha = 1.8 / sums.detach().amax(-1).square()
        return steps.iterate_implicitly(x, alpha, RIDGE, iterations)
    alpha = 2 / sums.max().square()
    powers = 0.5 ** torch.arange(reference.MOST_HALVINGS, dtype=x.dtype, device=x.device)
    residuals = steps.residuals(x.detach(), alpha.detach() * powers).amax(0)
    # The first start that passes; if none does, a tenth halving. Nothing waits for the number.
    failed = (residuals > reference.CONTRACTION).to(x.dtype).cumprod(0).sum()
    alpha = alpha * 0.5**failed
    v = steps.iterate(x, alpha.expand(x.shape[0]), 0.0, iterations)
    if method == "normalized":
        scale = sums.rsqrt()
        v = scale[:, :, None] * v * scale[:, None, :]
    return v
