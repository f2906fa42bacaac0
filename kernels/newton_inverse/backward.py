"""The Triton kernels of the Newton-Schulz iteration, backward.

The unrolled gradient computes the iterates once more and keeps them in memory, then walks back:
with Y = V P and V' = 2 V - Y V,

    dY = -G V^T,  dP += V^T dY,  dV = 2 G - Y^T G + dY P^T.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from ..runtime.mathematics import single
from .forward import iterate_large, without_tf32
from .mathematics import load_square, multiply, store_square
from .plan import LARGEST_ON_CHIP, plan


@triton.jit(do_not_specialize=["size"])
def _implicit_gradient(grad, v, dx, size, M: tl.constexpr):
    """-V^T G V^T."""
    at = tl.program_id(0).to(tl.int64) * size * size
    g, _ = load_square(grad + at, size, M)
    y, _ = load_square(v + at, size, M)
    y = tl.trans(y)
    store_square(dx + at, -multiply(multiply(y, g), y), size, M)


@triton.jit(do_not_specialize=["size", "iterations"])
def _unrolled_gradient(
    grad, x, alpha, iterates, dx, dalpha, ridge, size, iterations, M: tl.constexpr
):
    ridge = single(ridge)
    bh = tl.program_id(0).to(tl.int64)
    at = bh * size * size
    iterates += at * iterations
    p, eye = load_square(x + at, size, M)
    p += ridge * eye
    a = tl.load(alpha + bh)
    v = a * p
    for i in range(iterations):
        store_square(iterates + i * size * size, v, size, M)
        v = 2 * v - multiply(multiply(v, p), v)
    tl.debug_barrier()  # other threads of the program read what was stored
    g, _ = load_square(grad + at, size, M)
    dp = tl.zeros((M, M), tl.float32)
    for back in range(iterations):
        v, _ = load_square(iterates + (iterations - 1 - back) * size * size, size, M)
        y = multiply(v, p)
        dy = -multiply(g, tl.trans(v))
        dp += multiply(tl.trans(v), dy)
        g = 2 * g - multiply(tl.trans(y), g) + multiply(dy, tl.trans(p))
    store_square(dx + at, dp + a * g, size, M)
    tl.store(dalpha + bh, tl.sum(g * p))


def implicit_gradient(grad: Tensor, v: Tensor) -> Tensor:
    """-V^T G V^T."""
    matrices, size, _ = v.shape
    if size > LARGEST_ON_CHIP:
        with without_tf32():
            return torch.bmm(torch.bmm(v.mT, grad), v.mT).neg_()
    dx = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    launch(_implicit_gradient, plan(matrices, size).implicit_gradient, grad, v, dx)
    return dx


def unrolled_gradient(
    grad: Tensor, x: Tensor, alpha: Tensor, ridge: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """The gradients of x and alpha through every iteration."""
    matrices, size, _ = x.shape
    if size > LARGEST_ON_CHIP:
        return _large_unrolled_gradient(grad, x, alpha, ridge, iterations)
    iterates = torch.empty((matrices, iterations, size, size), dtype=torch.float32, device=x.device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dalpha = torch.empty(alpha.shape, dtype=alpha.dtype, device=x.device)
    how = plan(matrices, size, iterations, ridge).iterate
    launch(_unrolled_gradient, how, grad, x, alpha, iterates, dx, dalpha)
    return dx, dalpha


@without_tf32()
def _large_unrolled_gradient(
    g: Tensor, x: Tensor, alpha: Tensor, ridge: float, iterations: int
) -> tuple[Tensor, Tensor]:
    p, iterates = iterate_large(x, alpha, ridge, iterations, keep=True)
    dp = torch.zeros_like(p)
    for v in reversed(iterates[:-1]):
        dy = torch.bmm(g, v.mT).neg_()
        dp.baddbmm_(v.mT, dy)
        g = torch.baddbmm(2 * g, torch.bmm(v, p).mT, g, alpha=-1).baddbmm_(dy, p.mT)
    return dp + alpha[:, None, None] * g, (g * p).sum((1, 2))
