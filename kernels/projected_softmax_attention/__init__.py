"""Gated softmax attention of a packed projection, with its local branch: one gradient tensor.

The last stages of RAVLT and MAViT are softmax attention in the frame of their linear mixers: one
projection packs q, k, v and a gate. PyTorch's fused attention is the core. The kernels do what
surrounds it in eager calls: rotation in place, sum and gate in one pass, and a gradient that
every kernel writes its slice of. A compiler sees the operators that it is composed of.
"""

import torch
from torch import Tensor

from ..depthwise_conv2d import TRITON_KERNELS, depthwise_conv2d
from ..projected_linear_attention import check_projection
from ..rotary import Rotary, apply_rotary, check_rotary
from ..runtime.dispatch import is_direct_call, runs_triton
from ..softmax_attention import softmax_attention
from . import operator, reference


def projected_softmax_attention(
    projection: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    heads: int,
    rotary: Rotary | None = None,
    overwrite: bool = False,
) -> Tensor:
    """(softmax(D^-0.5 q k^T) v + conv(v)) * gate, of a projection that packs q, k, v and the gate.

    The core of the softmax blocks of RAVLT (arXiv:2411.07635) and MAViT (arXiv:2507.00698) between
    their two projections; q and k are rotated first.

    Args:
        projection: (B, H, W, 4 C), the channel blocks q, k, v, gate in this order, each of
            `heads` heads; any strides with the last axis contiguous.
        weight, bias: of the local branch, as in `depthwise_conv2d`: (C, 1, k, k) and (C,).
        heads: number of heads; C is a multiple of it.
        rotary: tables of `rotary_tables` for H * W tokens, or None.
        overwrite: q and k may be rotated in place, which saves a copy of both until backward: of
            a projection that nothing else reads.

    Returns:
        (B, H, W, C) contiguous, in the dtype of `projection`.

    Raises:
        ValueError: if shapes disagree.
    """
    check_projection(projection, weight, heads)
    if rotary is not None:
        check_rotary(rotary, "projection", projection.shape[1] * projection.shape[2])
    if not runs_triton(projection):
        return reference.projected_softmax_attention(
            projection, weight, bias, heads, rotary, attention=softmax_attention
        )
    tensors = (projection, weight, bias, *(rotary or ()))
    if (
        weight.shape[-1] not in TRITON_KERNELS
        or (rotary is not None and rotary[0].dtype != torch.float32)
        or not is_direct_call(tensors, "projected_softmax_attention")
    ):
        return reference.projected_softmax_attention(
            projection, weight, bias, heads, rotary, depthwise_conv2d, apply_rotary
        )
    return operator.projected_softmax_attention(projection, weight, bias, rotary, heads, overwrite)
