"""The operators: one public function each, with a reference and a Triton kernel behind it."""

from .agent_attention import agent_attention
from .backend import force
from .batch_norm import batch_norm
from .conv import conv2d
from .depthwise_conv import depthwise_conv2d
from .focused_attention import focused_linear_attention
from .gaussian_attention import gaussian_attention
from .landmark_kernel import landmark_kernel
from .layer_norm import add_layer_norm, layer_norm
from .linear import linear
from .linear_attention import linear_attention
from .newton_inverse import newton_inverse
from .projected_attention import projected_linear_attention
from .projected_softmax_attention import projected_softmax_attention
from .rotary import Rotary, apply_rotary, rotary_tables
from .window_attention import window_attention

__all__ = [
    "Rotary",
    "add_layer_norm",
    "agent_attention",
    "apply_rotary",
    "batch_norm",
    "conv2d",
    "depthwise_conv2d",
    "focused_linear_attention",
    "force",
    "gaussian_attention",
    "landmark_kernel",
    "layer_norm",
    "linear",
    "linear_attention",
    "newton_inverse",
    "projected_linear_attention",
    "projected_softmax_attention",
    "rotary_tables",
    "window_attention",
]
