"""Magnitude-aware linear attention (MALA; arXiv:2507.00698, ICCV 2025)."""

from .base import register_mixer
from .linear import LinearMixer


@register_mixer("mala")
class MagnitudeAware(LinearMixer):
    """Linear attention whose sharpness grows with the query's length, as softmax attention's does.

    A factor beta = 1 + 1 / z and an offset of z mean(v) replace the division (eq. 8).
    """

    feature_map = "elu_plus_one"
    readout = "magnitude_aware"
