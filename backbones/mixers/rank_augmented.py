"""Rank-augmented linear attention (RALA; arXiv:2411.07635, CVPR 2025)."""

from timm.models import register_notrace_module

from .linear import LinearMixer


@register_notrace_module
class RankAugmented(LinearMixer):
    """Linear attention whose keys are weighted by the global query and whose output is gated.

    The weights raise the rank of the state, the gate that of the output (eqs. 5 and 6).
    """

    feature_map = "elu_plus_one"
    key_weights = "global_query"
