"""Hedgehog's linear attention (arXiv:2402.04347, ICLR 2024): learned features that stay spiky."""

import torch
from torch import Tensor, nn

from ...kernels.runtime.dispatch import without_autocast
from ..context import Context, Place
from .base import register_mixer
from .projected import PackedAttention, ProjectedMixer

EPSILON = 1e-6


class HedgehogAttention(PackedAttention):
    """phi(q_i) sum_j phi(k_j)^T v_j / (phi(q_i) . sum_j phi(k_j) + 1e-6), per head.

    phi(x) is the softmax over the 2 D channels of (W x, -W x), with a matrix W (D, D) per head,
    one for queries and one for keys. Both begin as the identity. Class tokens take part as all
    others do. Sums are in float32 or wider.

    Args:
        place: where the mixer stands.
    """

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        identity = torch.eye(self.head_dim).repeat(self.num_heads, 1, 1)
        self.query_map = nn.Parameter(identity)
        self.key_map = nn.Parameter(identity.clone())

    def forward(self, projection: Tensor, context: Context) -> Tensor:
        """A packed projection (B, N, 3 C) to (B, N, C)."""
        dtype = projection.dtype
        wide = torch.promote_types(dtype, torch.float32)
        blocks = projection.unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = blocks.permute(2, 0, 3, 1, 4).to(wide).unbind()
        with without_autocast(projection):
            query = features(query, self.query_map.to(wide))
            key = features(key, self.key_map.to(wide))
            state = key.transpose(-2, -1) @ value
            total = key.sum(-2, keepdim=True).transpose(-2, -1)
            y = (query @ state) / (query @ total + EPSILON)
        return y.to(dtype).transpose(1, 2).flatten(2)


def features(x: Tensor, matrix: Tensor) -> Tensor:
    """The features (B, heads, N, 2 D) of queries or keys (B, heads, N, D).

    Args:
        x: queries or keys.
        matrix: (heads, D, D).
    """
    x = x @ matrix.transpose(-2, -1)
    return torch.cat((x, -x), -1).softmax(-1)


@register_mixer("hedgehog")
class Hedgehog(ProjectedMixer):
    """`HedgehogAttention` between projections."""

    attention: HedgehogAttention

    def __init__(self, place: Place) -> None:
        super().__init__(place, HedgehogAttention(place))

    def no_weight_decay(self) -> set[str]:
        """The matrices of the features, which decay would draw away from the identity."""
        return {"attention.query_map", "attention.key_map"}
