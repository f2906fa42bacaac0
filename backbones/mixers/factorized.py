"""Factorised attention (FaViT, arXiv:2312.08614): shares of the channels, and few keys for each."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.softmax_attention import attention_of_parts
from ...kernels.window_pool import window_pool
from ..context import Context, Place
from ..initialization import init_as_convolution
from ..layers import DepthwiseConv2d
from ..norms import LayerNorm, is_plain
from .attention_map import attend, make_attention_drop
from .base import TokenMixer, refuse_prefix_tokens, register_mixer
from .projected import rename_entries


class LocalShare(nn.Module):
    """Keys and values of a share of the channels, for the places of a window.

    Args:
        dim: channels of the share, a multiple of `num_heads`.
        num_heads: heads, which share the projections.
        window_size: w.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.num_heads, self.window_size = num_heads, window_size
        width = dim // num_heads
        self.fc = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.local = DepthwiseConv2d(dim, 3)
        self.attn_drop = make_attention_drop()

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, w^2, heads, 2 D) of tokens (B, w^2, heads, D), and what is added to
        the values."""
        key_value = self.key_value(self.fc(tokens))
        value = key_value.chunk(2, -1)[1].flatten(2)
        local = convolve(self.local, value, (self.window_size, self.window_size))
        return key_value, local.unflatten(2, (self.num_heads, -1))

    def fuse(self) -> nn.Module:
        """This share, whose two projections are one, if nothing stands between them."""
        first, last = self.fc, self.key_value
        if is_plain(first) and is_plain(last) and first.bias is not None and last.bias is not None:
            with torch.no_grad():
                last.bias.add_(last.weight @ first.bias)
                last.weight.copy_(last.weight @ first.weight)
            self.fc = nn.Identity()
        return self


def convolve(layer: nn.Module, x: Tensor, size: tuple[int, int]) -> Tensor:
    """A convolution of tokens (B, N, C), which are a map of some size."""
    return layer(x.unflatten(1, size).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)


@register_mixer("factorized")
class Factorized(TokenMixer):
    """Softmax attention of shares of the channels to keys of different grain (section III).

    An eighth of the channels attends, as one head, to a map that a strided convolution has made
    smaller; the others to the w x w places of windows, at all tokens and, if the map is reduced, at
    tokens that are as far apart as the reduction says.

    Args:
        place: where the mixer stands.
        reduction: R, size and stride of the convolution, and the second share's dilation.
        window_size: w.

    Raises:
        ValueError: if there are class tokens, or fewer than a channel per head for each share.
    """

    def __init__(self, place: Place, *, reduction: int = 2, window_size: int = 7) -> None:
        super().__init__()
        refuse_prefix_tokens(place, "windows hold the tokens of a map")
        dim, heads = place.dim, place.num_heads
        dilations = (1,) if reduction == 1 else (1, reduction)
        # Whole heads; what this leaves goes to the reduced map.
        share = 7 * dim // (8 * len(dilations)) // heads * heads
        if not share:
            raise ValueError(
                f"dim is {dim}, too few channels for {len(dilations)} local shares of {heads} "
                "heads: choose a larger width or fewer heads"
            )
        local = share * len(dilations)
        self.num_heads, self.reduction = heads, reduction
        self.window_size, self.dilations = window_size, dilations
        self.global_dim = dim - local
        self.query = nn.Linear(dim, dim)
        self.reduce = nn.Conv2d(self.global_dim, self.global_dim, reduction, stride=reduction)
        self.norm = LayerNorm(self.global_dim, eps=1e-5)
        self.key_value = nn.Linear(self.global_dim, 2 * self.global_dim)
        self.local = DepthwiseConv2d(self.global_dim, 3)
        self.depthwise = DepthwiseConv2d(local, 3)
        self.pointwise = nn.Linear(local, local)
        self.shares = nn.ModuleList(LocalShare(share, heads, window_size) for _ in dilations)
        self.attn_drop = make_attention_drop()
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        image = x.unflatten(1, context.size).permute(0, 3, 1, 2)
        reduced, image = image.split((self.global_dim, x.shape[-1] - self.global_dim), 1)
        values = self.pointwise(self.depthwise(image).permute(0, 2, 3, 1))
        places = window_pool(
            values, heads=self.num_heads, window=self.window_size, dilations=self.dilations
        )
        shares = [share(tokens) for share, tokens in zip(self.shares, places, strict=True)]
        drops: list[Any] = [part.attn_drop for part in (self, *self.shares)]
        attentions = None
        if any(drop is not None for drop in drops):
            attentions = [partial(attend, attn_drop=drop) for drop in drops]
        y = attention_of_parts(self.query(x), self.reduce_map(reduced), shares, attentions)
        return self.out_proj(y)

    def reduce_map(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, M, 1, 2 C) of a map (B, C, H, W) that is made smaller, and what is
        added to the values."""
        # A map loses what a multiple of the stride leaves over, but a smaller one is padded.
        if min(image.shape[2:]) < self.reduction:
            bottom, right = (max(self.reduction - side, 0) for side in image.shape[2:])
            image = F.pad(image, (0, right, 0, bottom))
        reduced = self.reduce(image)
        key_value = self.key_value(self.norm(reduced.flatten(2).transpose(1, 2)))
        local = convolve(self.local, key_value.chunk(2, -1)[1], reduced.shape[2:])
        return key_value[:, :, None], local[:, :, None]

    def init_weights(self, place: Place) -> None:
        super().init_weights(place)
        if place.fan_out:
            # The authors' layer is a convolution of 1 x 1.
            init_as_convolution(self.pointwise)

    def convert_checkpoint(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' layers, renamed, and their convolution of 1 x 1 as a matrix."""
        names = {
            "q.": "query.",
            "kv_g.": "key_value.",
            "sr.": "reduce.",
            "local_conv_g.": "local.",
            "kv_l.depth_conv.": "depthwise.",
            "kv_l.point_conv.": "pointwise.",
        }
        for number in range(len(self.shares)):
            names |= {
                f"fcs.{number}.": f"shares.{number}.fc.",
                f"single_heads.{number}.": f"shares.{number}.key_value.",
                f"local_convs.{number}.": f"shares.{number}.local.",
            }
        entries = rename_entries(entries, names)
        if (weight := entries.get("pointwise.weight")) is not None:
            entries["pointwise.weight"] = weight.flatten(1)
        return entries
