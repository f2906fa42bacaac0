"""Spatial-reduction attention of the Pyramid Vision Transformer (arXiv:2102.12122, ICCV 2021)."""

import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ...kernels.rotary import Rotary
from ..layers import LayerNorm, Linear, padded
from .place import Place


@register_notrace_module
class SpatialReduction(nn.Module):
    """Softmax attention to keys and values of a map that a strided convolution has made smaller.

    softmax(D^-0.5 q k^T) v with q = x Wq and k, v = LayerNorm(conv(x)) Wkv (eqs. 1-4), conv of
    size and stride R; sides that R does not divide are padded with zeros. Rotary tables are not
    used: the keys have no place in the map.

    Args:
        place: where the mixer stands.
        reduction: R, at least 2 (without reduction it is the mixer 'softmax').

    Raises:
        ValueError: if `reduction` is below 2, or there are class tokens, which are in no map.
    """

    def __init__(self, place: Place, *, reduction: int = 2) -> None:
        super().__init__()
        if reduction < 2:
            raise ValueError(
                f"reduction is {reduction}, expected at least 2: without one, use 'softmax'"
            )
        if place.prefix_tokens:
            raise ValueError(
                f"spatial reduction takes a map alone, not {place.prefix_tokens} class tokens "
                "in front of it: use 'softmax' here"
            )
        dim = place.dim
        self.num_heads = place.num_heads
        self.query = Linear(dim, dim)
        self.reduce = nn.Conv2d(dim, dim, reduction, stride=reduction)
        self.norm = LayerNorm(dim, eps=1e-5)
        self.key_value = Linear(dim, 2 * dim)
        self.out_proj = Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        size: tuple[int, int],
        rotary: Rotary | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """(B, H * W, C) to (B, H * W, C), of a map of size (H, W); see `ProjectedMixer`."""
        image = padded(x.unflatten(1, size).permute(0, 3, 1, 2), self.reduce.stride[0])
        reduced = self.norm(self.reduce(image).flatten(2).transpose(1, 2))
        query = self.query(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key, value = (
            self.key_value(reduced).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        y = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(y.transpose(1, 2).flatten(2), scale)
