"""Linear attention from one template, in which a mechanism is three choices."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from ...kernels.linear_attention import FeatureMap, KeyWeights, Readout, linear_attention
from ...kernels.projected_linear_attention import projected_linear_attention
from ..context import Context, Place
from .projected import PackedAttention, ProjectedMixer


class LinearAttention(PackedAttention):
    """(attention(q, k, v) + conv(v)) * gate at a cost linear in the number of tokens.

    Args:
        place: where the mixer stands.
        feature_map, key_weights, readout: see `linsight.kernels.linear_attention`.
        gate: whether the projection's fourth block multiplies the result.
        local_kernel: see `PackedAttention`.
        rotary: whether to rotate the features of q and k by their tokens' positions in the map.
            No features are rotated in a place with class tokens, which have no position, or in a
            body that rotates q and k itself.
    """

    def __init__(
        self,
        place: Place,
        *,
        feature_map: FeatureMap,
        key_weights: KeyWeights,
        readout: Readout,
        gate: bool,
        local_kernel: int,
        rotary: bool,
    ) -> None:
        super().__init__(place, local_kernel)
        self.rotary = rotary and not (place.prefix_tokens or place.rotary)
        self.mechanism: dict[str, Any] = {
            "feature_map": feature_map,
            "key_weights": key_weights,
            "readout": readout,
        }
        # With a local branch, one operator then computes all that stands between projections.
        self.packed = gate and not place.prefix_tokens

    def forward(self, projection: Tensor, context: Context) -> Tensor:
        rotary = context.rotary(self.head_dim, projection) if self.rotary else None
        weight = self.local_weight if self.packed else None
        if weight is not None:
            return projected_linear_attention(
                torch.unflatten(projection, 1, context.size),
                weight,
                self.local_bias,
                heads=self.num_heads,
                rotary=rotary,
                **self.mechanism,
            ).flatten(1, 2)
        blocks = projection.unflatten(-1, (-1, self.num_heads, self.head_dim))
        query, key, value, *gate = blocks.unbind(2)
        return linear_attention(
            query,
            key,
            value,
            rotary=rotary,
            local=self.local_branch(value, context.size),
            gate=gate[0] if gate else None,
            **self.mechanism,
        ).flatten(2)


class LinearMixer(ProjectedMixer):
    """A `LinearAttention` between projections. Subclasses choose its mechanism.

    Args:
        place: where the mixer stands.
        gate: whether to project a fourth block, which multiplies the result.
        local_kernel: size of the depthwise convolution of the values, odd; 0 for no convolution.
        rotary: see `LinearAttention`.
    """

    attention: LinearAttention
    feature_map: ClassVar[FeatureMap]
    key_weights: ClassVar[KeyWeights] = "uniform"
    readout: ClassVar[Readout] = "normalized"

    def __init__(
        self, place: Place, *, gate: bool = True, local_kernel: int = 5, rotary: bool = True
    ) -> None:
        attention = LinearAttention(
            place,
            feature_map=self.feature_map,
            key_weights=self.key_weights,
            readout=self.readout,
            gate=gate,
            local_kernel=local_kernel,
            rotary=rotary,
        )
        super().__init__(place, attention, blocks=4 if gate else 3)

    def init_weights(self, place: Place) -> None:
        super().init_weights(place)
        self.attention.init_local()
