"""The Newton-Schulz iteration in plain PyTorch, with each variant's own gradient."""

import torch
from torch import Tensor

# Halvings of the start, while a column of the residual sums to more than CONTRACTION.
CONTRACTION = 1.01
MOST_HALVINGS = 10


def iterate(x: Tensor, alpha: Tensor, ridge: float, iterations: int) -> Tensor:
    """V of V_0 = alpha P, V <- 2 V - (V P) V, with P = x + ridge I."""
    p = x + ridge * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    v = alpha[..., None, None] * p
    for _ in range(iterations):
        v = 2 * v - (v @ p) @ v
    return v


def iterate_implicitly(x: Tensor, alpha: Tensor, ridge: float, iterations: int) -> Tensor:
    """`iterate` with the gradient -V^T G V^T of an exact inverse."""
    fixed = x.detach()
    v = iterate(fixed, alpha.detach(), ridge, iterations)
    if torch.is_grad_enabled() and x.requires_grad:
        v = v - v @ (x - fixed) @ v
    return v


def residuals(x: Tensor, alphas: Tensor) -> Tensor:
    """The largest column sum of |I - alpha x x|, per matrix and alpha: (B, alphas)."""
    square = x @ x
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    sums = [(eye - alpha * square).abs().sum(-2).amax(-1) for alpha in alphas.unbind()]
    return torch.stack(sums, -1)
