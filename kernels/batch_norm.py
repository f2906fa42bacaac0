"""Batch normalisation in training, fused with its activation and with the bias before it.

PyTorch adds a convolution's bias, gathers statistics, normalises and activates one after the other,
and goes back the same way: sixteen passes over the map. Here they are eight, and the map that the
activation is applied to is not kept. A compiler sees `reference`, which it fuses with what stands
around it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from .backend import check_vectors, eager_function, plain, runs_triton
from .conv import Activation, activated, channels_last, check_activation

WIDEST_TRITON_MAP = 4096


def reference(
    x: Tensor,
    offset: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    activation: Activation | None,
) -> Tensor:
    """See `batch_norm`."""
    if offset is not None:
        x = x + offset.to(x.dtype)[:, None, None]
    norm = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    return activated(norm, activation)


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    offset: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: Activation | None = None,
) -> Tensor:
    """a((y - mean(y)) / sqrt(var(y) + eps) * weight + bias), y = x + offset (arXiv:1502.03167).

    Mean and (biased) variance are those of each channel in this batch. The offset, a bias of the
    layer before, is in the running mean alone: the result does not depend on it, so its gradient
    is zero.

    Args:
        x: (B, C, H, W), float32, float64, float16 or bfloat16; in the channels-last memory format
            the result is, too, and nothing is copied.
        weight, bias: (C,), in the dtype of `x` or float32.
        running_mean, running_var: (C,), in the dtype of `weight`, moved in place towards the
            batch's mean and its unbiased estimate of the variance.
        offset: (C,), of any floating dtype, or none.
        momentum: the batch's share in the running statistics.
        eps: added to the variance.
        activation: a, 'gelu' (exact, erf), 'relu' or none.

    Returns:
        (B, C, H, W) in the dtype of `x`, under autocast too; computed in float32 or wider.

    Raises:
        ValueError: if shapes disagree, for another activation, or of one value a channel.
    """
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, C, H, W)")
    check_vectors(
        x.shape[1],
        weight=weight,
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
        offset=offset,
    )
    check_activation(activation)
    if x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(
            f"x has shape {tuple(x.shape)}: one value a channel has no variance; take a larger "
            "batch or image, or evaluation mode"
        )
    args = (offset, weight, bias, running_mean, running_var, momentum, eps, activation)
    usable = 0 < x.shape[1] <= WIDEST_TRITON_MAP and x.numel() and runs_triton(x)
    if not usable or not plain((x, *args)):
        return reference(x, *args)
    return _forward(channels_last(x), *args)[0]


# The Triton side. Triton itself is imported at the first launch, not before.


def _run(x, offset, weight, bias, running_mean, running_var, momentum, eps, activation):
    from . import batch_norm_triton as kernels

    statistics = torch.empty((2, x.shape[1]), dtype=torch.float32, device=x.device)
    kernels.gather(x, offset, running_mean, running_var, momentum, eps, statistics)
    increment_version((running_mean, running_var))
    out = torch.empty_like(x)
    kernels.normalize(x, statistics, weight, bias, activation, out)
    return out, statistics


def _save(ctx, inputs, output):
    x, offset, weight, bias, *_, ctx.activation = inputs
    ctx.save_for_backward(x, offset, weight, bias, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    from . import batch_norm_triton as kernels

    if grad is None:
        return (None,) * 9
    x, offset, weight, bias, statistics = ctx.saved_tensors
    dx = torch.empty_like(x)
    dbias, dweight = kernels.backward(
        channels_last(grad), x, statistics, weight, bias, ctx.activation, dx
    )
    # Not none: a parameter without a gradient is one that distributed training waits for.
    doffset = None if offset is None else torch.zeros_like(offset)
    return dx, doffset, dweight.to(weight.dtype), dbias.to(bias.dtype), *(None,) * 5


_forward = eager_function("batch_norm", _run, _save, _differentiate)
