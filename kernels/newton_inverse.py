"""The Newton-Schulz inverse of SOFT's landmark matrices, with each variant's own gradient."""

from typing import Literal, get_args

import torch
from torch import Tensor

from .backend import Operator, runs_triton, without_autocast

InverseMethod = Literal["regularized", "normalized", "unregularized"]

RIDGE = 0.01
# The batch-wide start is halved until the residual's column sums are below this.
CONTRACTION = 1.01
MOST_HALVINGS = 10


def reference(x: Tensor, alpha: Tensor, ridge: float, iterations: int) -> Tensor:
    """V of V_0 = alpha P, V <- 2 V - (V P) V, with P = x + ridge I."""
    p = x + ridge * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    v = alpha[..., None, None] * p
    for _ in range(iterations):
        v = 2 * v - (v @ p) @ v
    return v


def _implicit_reference(x: Tensor, alpha: Tensor, ridge: float, iterations: int) -> Tensor:
    """`reference` with the gradient -V^T G V^T of an exact inverse."""
    fixed = x.detach()
    v = reference(fixed, alpha.detach(), ridge, iterations)
    if torch.is_grad_enabled() and x.requires_grad:
        v = v - v @ (x - fixed) @ v
    return v


def newton_inverse(
    x: Tensor, *, method: InverseMethod = "regularized", iterations: int = 20
) -> Tensor:
    """The inverse of symmetric positive matrices by a fixed number of Newton-Schulz iterations.

    From V_0 = alpha P, V <- 2 V - V P V (SOFT, arXiv:2110.11945, algorithm 1). Where it has not
    converged the result is that of the iteration, which SOFT's weights were trained with. With
    rho the largest row sum,

        regularized     P = x + 0.01 I, alpha = 1.8 / rho^2 of each matrix. The gradient is that
                        of an exact inverse, -V^T G V^T, and none goes through alpha.
        unregularized   P = x, alpha = 2 / rho^2 with rho that of all matrices together, halved
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
    triton = runs_triton(x)
    sums = x.sum(-1)
    if method == "regularized":
        alpha = 1.8 / sums.detach().amax(-1).square()
        return (_implicit if triton else _implicit_reference)(x, alpha, RIDGE, iterations)
    alpha = 2 / sums.max().square()
    alpha = alpha * _halvings(x.detach(), alpha.detach(), triton)
    v = (_unrolled if triton else reference)(x, alpha.expand(x.shape[0]), 0.0, iterations)
    if method == "normalized":
        scale = sums.rsqrt()
        v = scale[:, :, None] * v * scale[:, None, :]
    return v


def _halvings(x: Tensor, alpha: Tensor, triton: bool) -> Tensor:
    """The power of a half that alpha is multiplied by, as a tensor: nothing waits for it."""
    powers = 0.5 ** torch.arange(MOST_HALVINGS, dtype=x.dtype, device=x.device)
    if triton:
        residuals = _residuals(x, alpha * powers).amax(0)
    else:
        square = x @ x
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        residuals = torch.stack(
            [(eye - alpha * power * square).abs().sum(-2).amax() for power in powers.unbind()]
        )
    # The first start that passes; if none does, a tenth halving.
    failed = (residuals > CONTRACTION).to(x.dtype).cumprod(0).sum()
    return 0.5**failed


# The Triton side. Triton itself is imported at the first launch, not before.


def _run(x: Tensor, alpha: Tensor, ridge: float, iterations: int) -> Tensor:
    from . import newton_inverse_triton as kernels

    return kernels.iterate(x.contiguous(), alpha.contiguous(), ridge, iterations)


def _run_fake(x, alpha, ridge, iterations):
    return x.new_empty(x.shape)


def _run_implicit_backward(grad: Tensor, v: Tensor) -> Tensor:
    from . import newton_inverse_triton as kernels

    return kernels.implicit_gradient(grad.contiguous(), v)


def _run_unrolled_backward(
    grad: Tensor, x: Tensor, alpha: Tensor, ridge: float, iterations: int
) -> tuple[Tensor, Tensor]:
    from . import newton_inverse_triton as kernels

    return kernels.unrolled_gradient(
        grad.contiguous(), x.contiguous(), alpha.contiguous(), ridge, iterations
    )


def _run_residuals(x: Tensor, alphas: Tensor) -> Tensor:
    from . import newton_inverse_triton as kernels

    return kernels.residuals(x.contiguous(), alphas.contiguous())


def _save_implicit(ctx, inputs, output):
    ctx.save_for_backward(output)


def _differentiate_implicit(ctx, grad):
    return _implicit_backward(grad, *ctx.saved_tensors), None, None, None


def _save_unrolled(ctx, inputs, output):
    x, alpha, ctx.ridge, ctx.iterations = inputs
    ctx.save_for_backward(x, alpha)


def _differentiate_unrolled(ctx, grad):
    dx, dalpha = _unrolled_backward(grad, *ctx.saved_tensors, ctx.ridge, ctx.iterations)
    return dx, dalpha, None, None


_implicit = Operator(
    "newton_implicit(Tensor x, Tensor alpha, float ridge, int iterations) -> Tensor",
    _run,
    _run_fake,
    _save_implicit,
    _differentiate_implicit,
)
_implicit_backward = Operator(
    "newton_implicit_backward(Tensor grad, Tensor v) -> Tensor",
    _run_implicit_backward,
    lambda grad, v: v.new_empty(v.shape),
)
_unrolled = Operator(
    "newton_unrolled(Tensor x, Tensor alpha, float ridge, int iterations) -> Tensor",
    _run,
    _run_fake,
    _save_unrolled,
    _differentiate_unrolled,
)
_unrolled_backward = Operator(
    "newton_unrolled_backward(Tensor grad, Tensor x, Tensor alpha, float ridge, int iterations) "
    "-> (Tensor, Tensor)",
    _run_unrolled_backward,
    lambda grad, x, alpha, ridge, iterations: (x.new_empty(x.shape), alpha.new_empty(alpha.shape)),
)
_residuals = Operator(
    "newton_residuals(Tensor x, Tensor alphas) -> Tensor",
    _run_residuals,
    lambda x, alphas: x.new_empty(x.shape[0], alphas.shape[0]),
)
