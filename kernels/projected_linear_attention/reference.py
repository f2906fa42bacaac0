"""The reference of `projected_linear_attention`, in plain PyTorch."""

from torch import Tensor

from ..depthwise_conv2d.reference import depthwise_conv2d
from ..linear_attention.reference import linear_attention
from ..rotary import Rotary


def unpack(x: Tensor, heads: int, blocks: int = 4) -> tuple[Tensor, ...]:
    """The blocks of a packed map as views (B, N, heads, D)."""
    return x.flatten(1, 2).unflatten(-1, (blocks, heads, -1)).unbind(2)


def projected_linear_attention(
    projection: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    heads: int,
    feature_map: str,
    key_weights: str,
    readout: str,
    rotary: Rotary | None,
) -> Tensor:
    """The two references, composed; see the public function."""
    batch, height, width, channels = projection.shape
    query, key, value, gate = unpack(projection, heads)
    local = depthwise_conv2d(projection.chunk(4, -1)[2], weight, bias).reshape(value.shape)
    y = linear_attention(query, key, value, feature_map, key_weights, readout, rotary, local, gate)
    return y.reshape(batch, height, width, channels // 4)
