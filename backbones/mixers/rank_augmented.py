"""Rank-augmented linear attention (RALA; arXiv:2411.07635, CVPR 2025)."""

from timm.models import register_notrace_module
from torch import Tensor

from ...kernels import Rotary, linear_attention
from .projected import ProjectedMixer


@register_notrace_module
class RankAugmented(ProjectedMixer):
    """Linear attention whose keys are weighted by the global query and whose output is gated.

    The weights raise the rank of the state, the gate that of the output (eqs. 5 and 6).
    """

    def __init__(
        self, dim: int, num_heads: int, *, gate: bool = True, local_kernel: int = 5
    ) -> None:
        super().__init__(dim, num_heads, gate=gate, local_kernel=local_kernel)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: Rotary | None,
        local: Tensor | None,
        gate: Tensor | None,
    ) -> Tensor:
        return linear_attention(
            query,
            key,
            value,
            feature_map="elu_plus_one",
            key_weights="global_query",
            rotary=rotary,
            local=local,
            gate=gate,
        )
