"""Gated linear attention of a packed projection, with its local branch: one gradient tensor.

RALA's and MALA's mixers are linear_attention(q, k, v, local=conv(v), gate=gate) of one
projection that packs q, k, v and the gate. Composed of the two operators, autograd would
assemble the projection's gradient through copies and sums of its own, as many bytes again as
the operators move; here every kernel writes its slice of it.
"""

from torch import Tensor

from ..depthwise_conv2d import TRITON_KERNELS
from ..linear_attention import FeatureMap, KeyWeights, Readout, check_options
from ..rotary import Rotary
from ..runtime.dispatch import runs_triton, state_fits
from . import operator, reference


def projected_linear_attention(
    projection: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    heads: int,
    feature_map: FeatureMap = "elu_plus_one",
    key_weights: KeyWeights = "uniform",
    readout: Readout = "normalized",
    rotary: Rotary | None = None,
) -> Tensor:
    """(attention(q, k, v) + conv(v)) * gate, of a projection that packs q, k, v and the gate.

    It is `linear_attention` with `local` the depthwise convolution of v, and `gate` the last
    quarter: the core of the RALA (arXiv:2411.07635) and MALA (arXiv:2507.00698) mixers between
    their two projections.

    Args:
        projection: (B, H, W, 4 C), the channel blocks q, k, v, gate in this order, each of
            `heads` heads; any strides with the last axis contiguous.
        weight, bias: of the local branch, as in `depthwise_conv2d`: (C, 1, k, k) and (C,).
        heads: number of heads; C is a multiple of it.
        feature_map, key_weights, readout, rotary: as in `linear_attention`, for H * W tokens.

    Returns:
        (B, H, W, C) contiguous, in the dtype of `projection`; sums are in float32 or wider.

    Raises:
        ValueError: if shapes disagree or an option is unknown.
    """
    check_projection(projection, weight, heads)
    tokens = projection.shape[1] * projection.shape[2]
    check_options(tokens, rotary, feature_map, key_weights, readout)
    head_dim = projection.shape[-1] // (4 * heads)
    if (
        not state_fits(head_dim, projection.device, feature_map == "norm_aware")
        or weight.shape[-1] not in TRITON_KERNELS
        or not runs_triton(projection)
    ):
        return reference.projected_linear_attention(
            projection, weight, bias, heads, feature_map, key_weights, readout, rotary
        )
    rows, columns = (None, None) if rotary is None else rotary
    return operator.projected_linear_attention(
        projection, weight, bias, rows, columns, heads, feature_map, key_weights, readout
    )[0]


def check_projection(projection: Tensor, weight: Tensor, heads: int) -> None:
    """Raise ValueError unless both are as `projected_linear_attention` says."""
    if projection.ndim != 4 or projection.shape[-1] % (4 * heads):
        raise ValueError(
            f"projection has shape {tuple(projection.shape)}, expected (B, H, W, 4 C) with C a "
            f"multiple of heads = {heads}"
        )
    channels = projection.shape[-1] // 4
    if weight.shape != (channels, 1, weight.shape[-1], weight.shape[-1]):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected ({channels}, 1, k, k) with odd k"
        )
