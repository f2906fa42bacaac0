"""Batch normalisation fused with its activation, over one process or a group of them.

In training PyTorch gathers statistics, normalises and activates one after the other, and goes
back the same way: twelve passes over the map. Here they are eight, and the map that the
activation is applied to is not kept. A compiler sees the reference, which it fuses with what
stands around it.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..runtime.activation import Activation, check_activation
from ..runtime.dispatch import (
    WIDEST_ROW,
    channels_last,
    check_vectors,
    is_direct_call,
    runs_triton,
)
from . import operator, reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    addend: Tensor | None = None,
    process_group: "ProcessGroup | None" = None,
) -> Tensor:
    """a((x - mean) / sqrt(var + eps) * weight + bias), per channel (arXiv:1502.03167).

    To it residual * x and `addend` are added, in the same pass (SLAB, arXiv:2405.11582, eq. 5).

    In training mean and (biased) variance are those of each channel in this batch, which the
    processes of a group share: each has its own number of values, and all get the statistics of
    all values, as `torch.nn.SyncBatchNorm` computes them. The gradients of weight and bias are
    this process's part. Otherwise mean and variance are the running statistics.

    Args:
        x: (B, C, H, W), float32, float64, float16 or bfloat16; in the channels-last memory format
            the result is, too, and nothing is copied.
        weight, bias: (C,), in the dtype of `x` or float32.
        running_mean, running_var: (C,), in the dtype of `weight`; in training moved in place
            towards the batch's mean and its unbiased estimate of the variance.
        training: whether to normalise with the statistics of the batch.
        momentum: the batch's share in the running statistics.
        eps: added to the variance.
        activation: a, 'gelu' (exact, erf), 'relu' or None.
        residual: (C,), any floating dtype, or None; needs that there is no activation.
        addend: of the shape and dtype of `x`, or None.
        process_group: the processes whose values a batch consists of, in training; None for this
            process alone. Each of them must call the operator, forward and backward.

    Returns:
        (B, C, H, W) in the dtype of `x`, under autocast too; computed in float32 or wider.

    Raises:
        ValueError: if shapes or dtypes disagree, for another activation, for one value per channel
            in training without a group, or for a residual with an activation.
    """
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, C, H, W)")
    check_vectors(
        x.shape[1], weight=weight, bias=bias, running_mean=running_mean, running_var=running_var,
        residual=residual,
    )  # fmt: skip
    check_activation(activation)
    if residual is not None and activation is not None:
        raise ValueError(f"residual needs that there is no activation, got {activation!r}")
    if addend is not None and (addend.shape, addend.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"addend is {addend.dtype} of shape {tuple(addend.shape)}, expected {x.dtype} of shape "
            f"{tuple(x.shape)} as x is"
        )
    args = (x, weight, bias, running_mean, running_var, residual, addend)
    usable = 0 < x.shape[1] <= WIDEST_ROW and x.numel() and runs_triton(x)
    usable = usable and is_direct_call(args, "batch_norm")
    if not training:
        records = torch.is_grad_enabled() and any(t.requires_grad for t in args[:3])
        if usable and not records and residual is None and addend is None:
            return operator.normalize(channels_last(x), *args[1:5], eps, activation)
        return reference.normalize(*args, eps, activation)
    if process_group is None and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(
            f"x has shape {tuple(x.shape)}: one value per channel has no variance; take a larger "
            "batch or image, or evaluation mode"
        )
    options = (momentum, eps, activation, process_group)
    if not usable:
        return reference.batch_norm(*args, *options)
    addend = None if addend is None else channels_last(addend)
    return operator.batch_norm(channels_last(x), *args[1:6], addend, *options)[0]
