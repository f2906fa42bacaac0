"""The backward kernels of `batch_norm`; `plan.py` has their order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from ..runtime.mathematics import activation_gradient
from .forward import standardize
from .plan import plan


@triton.jit(do_not_specialize=["pixels"])
def _gradient_sums(
    grad, x, statistics, weight, bias, parts, pixels,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """This program's part (2, C) of the gradients of bias and weight."""
    row = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, P)[None, :]
    live = c < C
    w = tl.load(weight + c, mask=live, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=live, other=0.0).to(tl.float32)
    dbias = tl.zeros((ROWS, P), tl.float32)
    dweight = tl.zeros((ROWS, P), tl.float32)
    tiles = tl.cdiv(pixels, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        n = tile * ROWS + row
        ok = (n < pixels) & live
        at = n.to(tl.int64) * C + c
        norm = standardize(
            tl.load(x + at, mask=ok, other=0.0).to(tl.float32), statistics, c, live, C
        )
        dy = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
        dy = activation_gradient(dy, norm * w + b, ACTIVATION, EXACT)
        dbias += dy
        dweight += dy * norm
    c = tl.arange(0, P)
    parts += tl.program_id(0).to(tl.int64) * (2 * C) + c
    tl.store(parts, tl.sum(dbias, 0), mask=c < C)
    tl.store(parts + C, tl.sum(dweight, 0), mask=c < C)


@triton.jit(do_not_specialize=["pixels"])
def _input_gradient(
    grad, x, statistics, weight, bias, residual, sums, dx, pixels,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr, EXACT: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, P)[None, :]
    live = c < C
    ok = (n < pixels) & live
    at = n * C + c
    norm = standardize(tl.load(x + at, mask=ok, other=0.0).to(tl.float32), statistics, c, live, C)
    dy = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
    w = tl.load(weight + c, mask=live, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=live, other=0.0).to(tl.float32)
    dy = activation_gradient(dy, norm * w + b, ACTIVATION, EXACT)
    # The values of all processes of a group, of which `pixels` are this one's.
    count = tl.load(statistics + 2 * C + c, mask=live, other=1.0)
    mean = tl.load(sums + c, mask=live, other=0.0) / count
    slope = tl.load(sums + C + c, mask=live, other=0.0) / count
    factor = w * tl.load(statistics + C + c, mask=live, other=0.0)
    total = factor * (dy - mean - norm * slope)
    if RESIDUAL:
        total += tl.load(residual + c, mask=live, other=0.0).to(tl.float32) * dy
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=ok)


def gradient_sums(
    grad: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str | None,
) -> Tensor:
    """The gradients of bias and weight from this process's values, (2, C) in float32."""
    how = plan(x.shape, x.dtype, x.device, activation)
    parts = torch.empty((how.programs, 2, x.shape[1]), dtype=torch.float32, device=x.device)
    launch(_gradient_sums, how.gradient_sums, grad, x, statistics, weight, bias, parts)
    return parts.sum(0)


def input_gradient(
    grad: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    sums: Tensor,
    activation: str | None,
    dx: Tensor,
) -> None:
    """Write the gradient of `x` to `dx`; `sums` are those of all processes of a group."""
    how = plan(x.shape, x.dtype, x.device, activation, residual=residual is not None).input_gradient
    residual = weight if residual is None else residual
    launch(_input_gradient, how, grad, x, statistics, weight, bias, residual, sums, dx)
