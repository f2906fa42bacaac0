"""Magnitude-aware linear attention (MALA; arXiv:2507.00698, ICCV 2025)."""

from timm.models import register_notrace_module

from .linear import LinearMixer


@register_notrace_module
class MagnitudeAware(LinearMixer):
    """Linear attention whose sharpness grows with the query's length, as that of softmax does.

    A factor beta = 1 + 1 / z and an offset of z mean(v) replace the division (eq. 8).
    """

    feature_map = "elu_plus_one"
    readout = "magnitude_aware"
