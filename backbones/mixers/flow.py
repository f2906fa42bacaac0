"""Flow attention (Flowformer; arXiv:2202.06258, ICML 2022): linear, with conserved flows."""

from torch import Tensor

from ...kernels.flow_attention import flow_attention
from ..context import Context, Place
from .base import register_mixer
from .projected import PackedAttention, ProjectedMixer


class FlowAttention(PackedAttention):
    """`flow_attention` of a packed projection."""

    def forward(self, projection: Tensor, context: Context) -> Tensor:
        """A packed projection (B, N, 3 C) to (B, N, C)."""
        blocks = projection.unflatten(-1, (3, self.num_heads, self.head_dim))
        return flow_attention(*blocks.unbind(2)).flatten(2)


@register_mixer("flow")
class Flow(ProjectedMixer):
    """`FlowAttention` between projections."""

    def __init__(self, place: Place) -> None:
        super().__init__(place, FlowAttention(place))
