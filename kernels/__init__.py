"""The operators: one public function each, with a reference and a Triton kernel behind it."""

from .backend import force
from .depthwise_conv import depthwise_conv2d
from .linear_attention import linear_attention
from .projected_attention import projected_linear_attention
from .rotary import Rotary, apply_rotary, rotary_tables
from .window_attention import window_attention

__all__ = [
    "Rotary",
    "apply_rotary",
    "depthwise_conv2d",
    "force",
    "linear_attention",
    "projected_linear_attention",
    "rotary_tables",
    "window_attention",
]
