"""The Triton kernels of the Newton-Schulz iteration, forward.

A matrix of up to 64 x 64 stays on the chip, one program per matrix: all iterations of the
forward pass are one launch. Beyond, cuBLAS multiplies in float32, faster than tiles of three
bfloat16 parts did (docs/performance.md).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from ..runtime.mathematics import single
from .mathematics import load_square, multiply, store_square
from .plan import LARGEST_ON_CHIP, plan


@triton.jit(do_not_specialize=["size", "iterations"])
def _iterate(x, alpha, v, ridge, size, iterations, M: tl.constexpr):
    ridge = single(ridge)
    bh = tl.program_id(0).to(tl.int64)
    p, eye = load_square(x + bh * size * size, size, M)
    p += ridge * eye
    y = tl.load(alpha + bh) * p
    for _ in range(iterations):
        y = 2 * y - multiply(multiply(y, p), y)
    store_square(v + bh * size * size, y, size, M)


@triton.jit(do_not_specialize=["size", "count"])
def _residuals(x, alphas, out, size, count, M: tl.constexpr):
    """The largest column sum of |I - alpha x x| for each alpha."""
    bh = tl.program_id(0).to(tl.int64)
    p, eye = load_square(x + bh * size * size, size, M)
    square = multiply(p, p)
    for i in range(count):
        residual = tl.abs(eye - tl.load(alphas + i) * square)
        tl.store(out + bh * count + i, tl.max(tl.sum(residual, 0), 0))


@contextmanager
def without_tf32() -> Iterator[None]:
    """Products of float32 as exact as float32 is: the iteration multiplies the errors of TF32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@without_tf32()
def iterate_large(x: Tensor, alpha: Tensor, ridge: float, iterations: int, keep: bool):
    """P and V_0 .. V_iterations, or the last alone, of large matrices."""
    p = x.clone()
    p.diagonal(dim1=1, dim2=2).add_(ridge)
    v = alpha[:, None, None] * p
    iterates = [v]
    for _ in range(iterations):
        v = torch.baddbmm(v, torch.bmm(v, p), v, beta=2, alpha=-1)
        iterates = [*iterates, v] if keep else [v]
    return p, iterates


def iterate(x: Tensor, alpha: Tensor, ridge: float, iterations: int) -> Tensor:
    """V after `iterations`, from alpha (x + ridge I), one alpha per matrix."""
    matrices, size, _ = x.shape
    if size > LARGEST_ON_CHIP:
        return iterate_large(x, alpha, ridge, iterations, keep=False)[1][-1]
    v = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(_iterate, plan(matrices, size, iterations, ridge).iterate, x, alpha, v)
    return v


def residuals(x: Tensor, alphas: Tensor) -> Tensor:
    """Per matrix and alpha, the largest column sum of |I - alpha x x|."""
    matrices, size, _ = x.shape
    if size > LARGEST_ON_CHIP:
        with without_tf32():
            square = torch.bmm(x, x)
        eye = torch.eye(size, dtype=x.dtype, device=x.device)
        sums = [(eye - a * square).abs().sum(1).amax(1) for a in alphas.unbind()]
        return torch.stack(sums, 1)
    out = torch.empty((matrices, len(alphas)), dtype=x.dtype, device=x.device)
    launch(_residuals, plan(matrices, size, alphas=len(alphas)).residuals, x, alphas, out)
    return out
