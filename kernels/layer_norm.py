"""Layer normalisation fused with the residual sum before it, in the dtype of the stream.

Under autocast PyTorch normalises in float32 and gives float32, so a block's norms and sums move
two to three times the bytes of its products. Here they are one pass: sums are in float32, what
is read and written stays in the stream's own dtype. A compiler sees `reference`, which it fuses
with what stands around it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import check_vectors, eager_function, plain, runs_triton, without_autocast

WIDEST_TRITON_ROW = 4096


def reference(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + branch and its norm; see `add_layer_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x):
        total = x if branch is None else (x.to(wide) + branch.to(wide)).to(x.dtype)
        norm = F.layer_norm(total.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return total, norm.to(x.dtype)


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
    return _apply(x, None, weight, bias, eps)[1]


def add_layer_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The residual sum s = x + branch, and `layer_norm` of it.

    Without a branch s is x: a block that goes on from the s it is given, not from x, has the
    gradients of both paths added by the norm's kernel.

    Args:
        x, branch: (..., C), of one shape, each of any floating dtype; no branch is zero.
        weight, bias: (C,), of the norm.
        eps: added to the variance.

    Returns:
        s and its norm, (..., C), both in the dtype of `x`, under autocast too; s is rounded to it
        before it is normalised.

    Raises:
        ValueError: if shapes disagree.
    """
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"branch has shape {tuple(branch.shape)}, expected {tuple(x.shape)}")
    return _apply(x, branch, weight, bias, eps)


def _apply(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    check_vectors(x.shape[-1], weight=weight, bias=bias)
    args = (x, branch, weight, bias, eps)
    if x.shape[-1] > WIDEST_TRITON_ROW or not runs_triton(x) or not plain(args):
        return reference(*args)
    return _forward(*args)


# The Triton side. Triton itself is imported at the first launch, not before.


def _run(x, branch, weight, bias, eps):
    from . import layer_norm_triton as kernels

    norm = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if branch is None else torch.empty_like(norm)
    branch = None if branch is None else branch.contiguous()
    kernels.forward(x.contiguous(), branch, weight, bias, eps, total, norm)
    return total, norm


def _save(ctx, inputs, output):
    x, branch, weight, bias, ctx.eps = inputs
    ctx.branch_dtype = None if branch is None else branch.dtype
    ctx.save_for_backward(x if branch is None else output[0], weight, bias)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dtotal, dnorm):
    from . import layer_norm_triton as kernels

    total, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = dtotal, None, None
    if dnorm is not None:
        dx = torch.empty(total.shape, dtype=total.dtype, device=total.device)
        dtotal = None if dtotal is None else dtotal.contiguous()
        sums = kernels.backward(dtotal, dnorm.contiguous(), total.contiguous(), weight, ctx.eps, dx)
        dweight, dbias = sums[0].to(weight.dtype), sums[1].to(bias.dtype)
    dbranch = None if dx is None or ctx.branch_dtype is None else dx.to(ctx.branch_dtype)
    return dx, dbranch, dweight, dbias, None


_forward = eager_function("layer_norm", _run, _save, _differentiate)
