"""Flow attention (Flowformer; arXiv:2202.06258, ICML 2022): linear, with conserved flows."""

import torch
from torch import Tensor

from ...kernels.runtime.dispatch import without_autocast
from ..context import Context, Place
from .base import register_mixer
from .projected import PackedAttention, ProjectedMixer

EPSILON = 1e-6


class FlowAttention(PackedAttention):
    """Linear attention in which tokens compete as sources and are allocated as sinks.

    With q and k behind a sigmoid, per head, token i as a sink takes in 1 / I_i = q_i . sum_j k_j,
    and token j as a source gives out 1 / O_j = k_j . sum_i q_i. Where each source gives out one
    unit, sink i takes in a_i = q_i . sum_j O_j k_j; where each sink takes in one, source j gives
    out c_j = k_j . sum_i I_i q_i, cut off at 1 and -1. Then (section 3.2)

    y_i = sigmoid(a_i) I_i q_i sum_j k_j^T v_j N softmax_j(c_j).

    Sums are in float32 or wider.
    """

    def forward(self, projection: Tensor, context: Context) -> Tensor:
        """A packed projection (B, N, 3 C) to (B, N, C)."""
        dtype = projection.dtype
        wide = torch.promote_types(dtype, torch.float32)
        blocks = projection.unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = blocks.permute(2, 0, 3, 1, 4).to(wide).unbind()
        with without_autocast(projection):
            query, key = query.sigmoid(), key.sigmoid()
            incoming = 1 / _flow(query, key.sum(-2, keepdim=True))
            outgoing = 1 / _flow(key, query.sum(-2, keepdim=True))
            allocated = _flow(query, outgoing.transpose(-2, -1) @ key).sigmoid()
            conserved = _flow(key, incoming.transpose(-2, -1) @ query).clamp(-1, 1)
            competing = conserved.softmax(-2) * value.shape[-2]
            state = key.transpose(-2, -1) @ (value * competing)
            y = (query @ state) * (allocated * incoming)
        return y.to(dtype).transpose(1, 2).flatten(2)


def _flow(x: Tensor, total: Tensor) -> Tensor:
    """Of each token the flow to the others, as the authors keep it from zero.

    Args:
        x: (B, heads, N, D).
        total: (B, heads, 1, D), a sum over tokens.

    Returns:
        (x + e) . (total + e) + e of every token, (B, heads, N, 1).
    """
    total = total + EPSILON
    return x @ total.transpose(-2, -1) + EPSILON * (total.sum(-1, keepdim=True) + 1)


@register_mixer("flow")
class Flow(ProjectedMixer):
    """`FlowAttention` between projections."""

    def __init__(self, place: Place) -> None:
        super().__init__(place, FlowAttention(place))
