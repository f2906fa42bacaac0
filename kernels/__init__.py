"""The operators: one public function each, with a reference and a Triton kernel behind it."""

from .agent_attention import agent_attention
from .backend import force
from .depthwise_conv import depthwise_conv2d
from .layer_norm import add_layer_norm, layer_norm
from .linear_attention import linear_attention
from .projected_attention import projected_linear_attention
from .rotary import Rotary, apply_rotary, rotary_tables

__all__ = [
    "Rotary",
    "add_layer_norm",
    "agent_attention",
    "apply_rotary",
    "depthwise_conv2d",
    "force",
    "layer_norm",
    "linear_attention",
    "projected_linear_attention",
    "rotary_tables",
]
