"""Layer normalisation fused with the residual sum before it, in the dtype of the stream.

Under autocast PyTorch normalises in float32 and gives float32, so a block's norms, scales and
sums move two to three times the bytes of its products. Here they are one pass each: sums are
in float32, what is read and written stays in the stream's own dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import LIBRARY, register, runs_triton, without_autocast

WIDEST_TRITON_ROW = 4096


def reference(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """x + scale * branch and its norm (or itself); see `add_layer_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x):
        total = x
        if branch is not None:
            branch = branch.to(wide)
            total = (x.to(wide) + (branch if scale is None else scale.to(wide) * branch)).to(
                x.dtype
            )
        if weight is None:
            return total, total
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
    _check(x, None, None, weight, bias)
    if not _runs(x):
        return reference(x, None, None, weight, bias, eps)[1]
    return _forward(x, None, None, weight, bias, eps)[1]


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The residual sum s = x + scale * branch, and `layer_norm` of it.

    Args:
        x, branch: (..., C), of one shape, each of any floating dtype.
        weight, bias: (C,), of the norm.
        scale: C elements (a layer scale, arXiv:2103.17239), or none for 1.
        eps: added to the variance.

    Returns:
        s and its norm, (..., C), both in the dtype of `x`, under autocast too; s is rounded to it
        before it is normalised.

    Raises:
        ValueError: if shapes disagree.
    """
    _check(x, branch, scale, weight, bias)
    scale = None if scale is None else scale.flatten()
    if not _runs(x):
        return reference(x, branch, scale, weight, bias, eps)
    return _forward(x, branch, scale, weight, bias, eps)


def scaled_add(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    """The residual sum x + scale * branch.

    Args:
        x, branch: (..., C), of one shape, each of any floating dtype.
        scale: C elements (a layer scale, arXiv:2103.17239).

    Returns:
        (..., C) in the dtype of `x`, under autocast too; computed in float32 or wider.

    Raises:
        ValueError: if shapes disagree.
    """
    _check(x, branch, scale, None, None)
    scale = scale.flatten()
    if not _runs(x):
        return reference(x, branch, scale, None, None, 0.0)[0]
    return _forward(x, branch, scale, None, None, 0.0)[0]


def _runs(x: Tensor) -> bool:
    return x.shape[-1] <= WIDEST_TRITON_ROW and runs_triton(x)


def _check(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"branch has shape {tuple(branch.shape)}, expected {tuple(x.shape)}")
    for name, vector in (("scale", scale), ("weight", weight), ("bias", bias)):
        if vector is not None and vector.numel() != x.shape[-1]:
            raise ValueError(
                f"{name} has {vector.numel()} elements, expected {x.shape[-1]}, the channels of x"
            )


# The Triton side. Triton itself is imported at the first launch, not before.


def _run(x, branch, scale, weight, bias, eps):
    from . import layer_norm_triton as kernels

    total, norm = _run_fake(x, branch, scale, weight, bias, eps)
    branch = branch if branch is None else branch.contiguous()
    kernels.forward(x.contiguous(), branch, scale, weight, bias, eps, total, norm)
    return total, norm


def _run_fake(x, branch, scale, weight, bias, eps):
    # An operator returns a fixed number of tensors: an empty one stands for none.
    shape, none = x.shape, (0,)
    return (
        torch.empty(none if branch is None else shape, dtype=x.dtype, device=x.device),
        torch.empty(none if weight is None else shape, dtype=x.dtype, device=x.device),
    )


def _run_backward(dtotal, dnorm, total, branch, scale, weight, bias, eps):
    from . import layer_norm_triton as kernels

    outputs = _run_backward_fake(dtotal, dnorm, total, branch, scale, weight, bias, eps)
    dtotal, dnorm, total, branch = (
        x if x is None else x.contiguous() for x in (dtotal, dnorm, total, branch)
    )
    kernels.backward(dtotal, dnorm, total, branch, scale, weight, eps, *outputs)
    return outputs


def _run_backward_fake(dtotal, dnorm, total, branch, scale, weight, bias, eps):
    given = dtotal if dnorm is None else dnorm

    def like(x: Tensor | None, wanted: Tensor | None) -> Tensor:
        if x is None or wanted is None:
            return torch.empty(0, dtype=given.dtype, device=given.device)
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    return (
        like(total, dnorm),
        like(branch, scale),
        like(scale, scale),
        like(weight, dnorm),
        like(bias, dnorm),
    )


_forward = register(
    "layer_norm(Tensor x, Tensor? branch, Tensor? scale, Tensor? weight, Tensor? bias, "
    "float eps) -> (Tensor, Tensor)",
    _run,
    _run_fake,
)
_backward = register(
    "layer_norm_backward(Tensor? dtotal, Tensor? dnorm, Tensor? total, Tensor? branch, "
    "Tensor? scale, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _run_backward_fake,
)


def _save(ctx, inputs, output):
    x, branch, scale, weight, bias, ctx.eps = inputs
    ctx.branch_dtype = None if branch is None else branch.dtype
    total = x if branch is None else output[0]
    # Of a sum alone, and of a branch without a scale, nothing is needed again.
    ctx.save_for_backward(
        None if weight is None else total, None if scale is None else branch, scale, weight, bias
    )
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dtotal, dnorm):
    total, branch, scale, weight, bias = ctx.saved_tensors
    # The outputs that stand for none have gradients as well.
    dtotal = None if ctx.branch_dtype is None else dtotal
    dnorm = None if weight is None else dnorm
    if dtotal is None and dnorm is None:
        return (None,) * 6
    dx, dbranch, dscale, dweight, dbias = (None,) * 5
    if scale is not None or dnorm is not None:
        dx, dbranch, dscale, dweight, dbias = _backward(
            dtotal, dnorm, total, branch, scale, weight, bias, ctx.eps
        )
    if dnorm is None:
        dx, dweight, dbias = dtotal, None, None
    if scale is None:
        dbranch = None if ctx.branch_dtype is None else dx.to(ctx.branch_dtype)
        dscale = None
    return dx, dbranch, dscale, dweight, dbias, None


torch.library.register_autograd(
    "linsight::layer_norm", _differentiate, setup_context=_save, lib=LIBRARY
)
