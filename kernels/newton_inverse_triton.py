"""The Triton kernels of `newton_inverse`.

A matrix of up to 64 x 64 stays on the chip, one program a matrix: all iterations of the
forward pass are one launch. Beyond, cuBLAS multiplies in float32, faster than tiles of three
bfloat16 parts did (docs/performance.md).

The unrolled gradient computes the iterates once more and keeps them in memory, then walks back:
with Y = V P and V' = 2 V - Y V,

    dY = -G V^T,  dP += V^T dY,  dV = 2 G - Y^T G + dY P^T.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import launch
from .triton_math import INTERPRETED, PRECISION

LARGEST_ON_CHIP = 16 if INTERPRETED.value else 64
WARPS = 4


@triton.jit
def _multiply(a, b):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _square(x, size, M: tl.constexpr):
    """A matrix of size x size padded to M x M with zeros, and the padded identity."""
    i = tl.arange(0, M)
    live = i < size
    at = i[:, None] * size + i[None, :]
    mask = live[:, None] & live[None, :]
    eye = tl.where((i[:, None] == i[None, :]) & mask, 1.0, 0.0)
    return tl.load(x + at, mask=mask, other=0.0), eye


@triton.jit
def _store(x, value, size, M: tl.constexpr):
    i = tl.arange(0, M)
    live = i < size
    at = i[:, None] * size + i[None, :]
    tl.store(x + at, value, mask=live[:, None] & live[None, :])


@triton.jit(do_not_specialize=["size", "iterations"])
def _iterate(x, alpha, v, ridge, size, iterations, M: tl.constexpr):
    bh = tl.program_id(0).to(tl.int64)
    p, eye = _square(x + bh * size * size, size, M)
    p += ridge * eye
    y = tl.load(alpha + bh) * p
    for _ in range(iterations):
        y = 2 * y - _multiply(_multiply(y, p), y)
    _store(v + bh * size * size, y, size, M)


@triton.jit(do_not_specialize=["size"])
def _implicit_gradient(grad, v, dx, size, M: tl.constexpr):
    """-V^T G V^T."""
    at = tl.program_id(0).to(tl.int64) * size * size
    g, _ = _square(grad + at, size, M)
    y, _ = _square(v + at, size, M)
    y = tl.trans(y)
    _store(dx + at, -_multiply(_multiply(y, g), y), size, M)


@triton.jit(do_not_specialize=["size", "iterations"])
def _unrolled_gradient(
    grad, x, alpha, iterates, dx, dalpha, ridge, size, iterations, M: tl.constexpr
):
    bh = tl.program_id(0).to(tl.int64)
    at = bh * size * size
    iterates += at * iterations
    p, eye = _square(x + at, size, M)
    p += ridge * eye
    a = tl.load(alpha + bh)
    v = a * p
    for i in range(iterations):
        _store(iterates + i * size * size, v, size, M)
        v = 2 * v - _multiply(_multiply(v, p), v)
    tl.debug_barrier()  # other threads of the program read what was stored
    g, _ = _square(grad + at, size, M)
    dp = tl.zeros((M, M), tl.float32)
    for back in range(iterations):
        v, _ = _square(iterates + (iterations - 1 - back) * size * size, size, M)
        y = _multiply(v, p)
        dy = -_multiply(g, tl.trans(v))
        dp += _multiply(tl.trans(v), dy)
        g = 2 * g - _multiply(tl.trans(y), g) + _multiply(dy, tl.trans(p))
    _store(dx + at, dp + a * g, size, M)
    tl.store(dalpha + bh, tl.sum(g * p))


@triton.jit(do_not_specialize=["size", "count"])
def _residuals(x, alphas, out, size, count, M: tl.constexpr):
    """The largest column sum of |I - alpha x x| for each alpha."""
    bh = tl.program_id(0).to(tl.int64)
    p, eye = _square(x + bh * size * size, size, M)
    square = _multiply(p, p)
    for i in range(count):
        residual = tl.abs(eye - tl.load(alphas + i) * square)
        tl.store(out + bh * count + i, tl.max(tl.sum(residual, 0), 0))


def _fits(size: int) -> bool:
    return size <= LARGEST_ON_CHIP


def _launch(size: int) -> dict:
    return {"M": max(16, 1 << (size - 1).bit_length()), "num_warps": WARPS, "num_stages": 1}


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Products of float32 as exact as float32 is: the iteration multiplies the errors of TF32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@_without_tf32()
def _iterates(x: Tensor, alpha: Tensor, ridge: float, iterations: int, keep: bool):
    """P and V_0 .. V_iterations, or the last alone, of large matrices."""
    p = x.clone()
    p.diagonal(dim1=1, dim2=2).add_(ridge)
    v = alpha[:, None, None] * p
    kept = [v]
    for _ in range(iterations):
        v = torch.baddbmm(v, torch.bmm(v, p), v, beta=2, alpha=-1)
        kept = [*kept, v] if keep else [v]
    return p, kept


def iterate(x: Tensor, alpha: Tensor, ridge: float, iterations: int) -> Tensor:
    """V after `iterations`, from alpha (x + ridge I), one alpha a matrix."""
    matrices, size, _ = x.shape
    if not _fits(size):
        return _iterates(x, alpha, ridge, iterations, keep=False)[1][-1]
    v = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(_iterate, (matrices,), x, alpha, v, ridge, size, iterations, **_launch(size))
    return v


def implicit_gradient(grad: Tensor, v: Tensor) -> Tensor:
    """-V^T G V^T."""
    matrices, size, _ = v.shape
    if not _fits(size):
        with _without_tf32():
            return torch.bmm(torch.bmm(v.mT, grad), v.mT).neg_()
    dx = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    launch(_implicit_gradient, (matrices,), grad, v, dx, size, **_launch(size))
    return dx


def unrolled_gradient(
    grad: Tensor, x: Tensor, alpha: Tensor, ridge: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """The gradients of x and alpha through every iteration."""
    matrices, size, _ = x.shape
    if not _fits(size):
        return _large_unrolled_gradient(grad, x, alpha, ridge, iterations)
    iterates = torch.empty((matrices, iterations, size, size), dtype=torch.float32, device=x.device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dalpha = torch.empty(alpha.shape, dtype=alpha.dtype, device=x.device)
    launch(
        _unrolled_gradient, (matrices,),
        grad, x, alpha, iterates, dx, dalpha, ridge, size, iterations, **_launch(size),
    )  # fmt: skip
    return dx, dalpha


@_without_tf32()
def _large_unrolled_gradient(
    g: Tensor, x: Tensor, alpha: Tensor, ridge: float, iterations: int
) -> tuple[Tensor, Tensor]:
    p, iterates = _iterates(x, alpha, ridge, iterations, keep=True)
    dp = torch.zeros_like(p)
    for v in reversed(iterates[:-1]):
        dy = torch.bmm(g, v.mT).neg_()
        dp.baddbmm_(v.mT, dy)
        g = torch.baddbmm(2 * g, torch.bmm(v, p).mT, g, alpha=-1).baddbmm_(dy, p.mT)
    return dp + alpha[:, None, None] * g, (g * p).sum((1, 2))


def residuals(x: Tensor, alphas: Tensor) -> Tensor:
    """Per matrix and alpha, the largest column sum of |I - alpha x x|."""
    matrices, size, _ = x.shape
    if not _fits(size):
        with _without_tf32():
            square = torch.bmm(x, x)
        eye = torch.eye(size, dtype=x.dtype, device=x.device)
        sums = [(eye - a * square).abs().sum(1).amax(1) for a in alphas.unbind()]
        return torch.stack(sums, 1)
    out = torch.empty((matrices, len(alphas)), dtype=x.dtype, device=x.device)
    launch(_residuals, (matrices,), x, alphas, out, size, len(alphas), **_launch(size))
    return out
