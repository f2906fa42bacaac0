"""Rank-augmented linear attention (RALA; arXiv:2411.07635, CVPR 2025)."""

from .base import register_mixer
from .linear import LinearMixer


@register_mixer("rala")
class RankAugmented(LinearMixer):
    """Linear attention whose keys are weighted by the global query and whose output is gated.

    The weights raise the rank of the state, the gate raises the rank of the output (eqs. 5, 6).
    """

    feature_map = "elu_plus_one"
    key_weights = "global_query"
