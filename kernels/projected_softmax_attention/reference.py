"""The reference of `projected_softmax_attention`, in plain PyTorch."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..depthwise_conv2d.reference import depthwise_conv2d
from ..rotary import Rotary
from ..rotary.reference import apply_rotary
from ..runtime.dispatch import rows_contiguous


def projected_softmax_attention(
    projection: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    heads: int,
    rotary: Rotary | None,
    convolve: Callable[..., Tensor] = depthwise_conv2d,
    rotate: Callable[[Tensor, Rotary], Tensor] = apply_rotary,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention,
) -> Tensor:
    """The composition of its parts; see the public function.

    Args:
        convolve, rotate, attention: the parts, by default their references; what a compiler is
            to see is composed of the operators.
    """
    batch, height, width, channels = projection.shape
    # One split, as each separate slice would make a gradient of the whole projection's size.
    both, value, gate = split_blocks(projection, heads)
    query, key = (both if rotary is None else rotate(both, rotary)).split(heads, 2)
    local = convolve(to_map(value, (height, width)), weight, bias)
    y = (attend(query, key, value, attention) + local.reshape(value.shape)) * gate
    return y.reshape(batch, height, width, channels // 4)


def split_blocks(x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q and k of a packed map, (B, N, 2 heads, D), its v and its gate, (B, N, heads, D)."""
    blocks = torch.unflatten(x.flatten(1, 2), -1, (4 * heads, -1))
    both, value, gate = blocks.split((2 * heads, heads, heads), 2)
    return both, value, gate


def to_map(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, N, heads, D) as a map (B, H, W, C)."""
    return torch.unflatten(rows_contiguous(x.flatten(2)), 1, size)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention,
) -> Tensor:
    """Softmax attention of (B, N, heads, D), by PyTorch."""
    return attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(
        1, 2
    )
