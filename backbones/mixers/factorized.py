"""Factorised attention (FaViT, arXiv:2312.08614): shares of the channels, and few keys for each."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.runtime.dispatch import cache_constants
from ..context import Context, Place
from ..initialization import init_as_convolution
from ..layers import DepthwiseConv2d
from ..norms import LayerNorm
from .attention_map import attend, make_attention_drop
from .base import TokenMixer, refuse_prefix_tokens, register_mixer
from .projected import rename_entries


class LocalShare(nn.Module):
    """Keys and values of a share of the channels, from the places of one window.

    The map is cut into squares, of each of which w x w tokens are read, `dilation` apart. For each
    place in a square, and each head, the values of all squares are averaged, and projected.

    Args:
        dim: channels of the share, a multiple of `num_heads`.
        num_heads: heads, which share the projections.
        window_size: w.
        dilation: distance between the tokens that are read.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, dilation: int) -> None:
        super().__init__()
        self.num_heads, self.window_size, self.dilation = num_heads, window_size, dilation
        width = dim // num_heads
        self.fc = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.local = DepthwiseConv2d(dim, 3)
        self.attn_drop = make_attention_drop()

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        """Attention (B, N, C) of queries (B, heads, N, D) to a map x (B, H, W, C)."""
        key, value = self.key_value(self.fc(self.pool(x))).chunk(2, -1)
        window = (self.window_size, self.window_size)
        image = value.transpose(2, 3).flatten(1, 2).unflatten(2, window)
        local = self.local(image).flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)
        y = attend(query, key, value + local, self.attn_drop)
        return y.transpose(1, 2).flatten(2)

    def pool(self, x: Tensor) -> Tensor:
        """(B, heads, w^2, D) averages over the squares of a map (B, H, W, C)."""
        extent = self.dilation * (self.window_size - 1) + 1
        down, across = ((side + extent - 1) // extent for side in x.shape[1:3])
        rows, columns = (
            places(side, squares, self.window_size, self.dilation, x.device)
            for side, squares in zip(x.shape[1:3], (down, across), strict=True)
        )
        x = x[:, rows[:, None], columns].unflatten(3, (self.num_heads, -1))
        x = x.unflatten(2, (across, self.window_size)).unflatten(1, (down, self.window_size))
        x = x.permute(0, 5, 2, 4, 1, 3, 6)  # (B, heads, w, w, down, across, D)
        # The authors' code pools the table of squares and channels as one row, in which the channel
        # changes first, to D averages of equal runs: so channels are mixed.
        return x.flatten(4).unflatten(4, (-1, down * across)).mean(-1).flatten(2, 3)


@cache_constants
def places(side: int, squares: int, window: int, dilation: int, device: torch.device) -> Tensor:
    """The tokens that are read along an axis: some per square, beyond the map its reflection."""
    number = torch.arange(squares * window, device=device)
    square, step = number // window, number % window
    extent = dilation * (window - 1) + 1
    period = 2 * side - 2 if side > 1 else 1
    place = (square * extent + step * dilation) % period
    return torch.minimum(place, period - place)


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
        self.global_dim = dim - local
        self.query = nn.Linear(dim, dim)
        self.reduce = nn.Conv2d(self.global_dim, self.global_dim, reduction, stride=reduction)
        self.norm = LayerNorm(self.global_dim, eps=1e-5)
        self.key_value = nn.Linear(self.global_dim, 2 * self.global_dim)
        self.local = DepthwiseConv2d(self.global_dim, 3)
        self.depthwise = DepthwiseConv2d(local, 3)
        self.pointwise = nn.Linear(local, local)
        self.shares = nn.ModuleList(
            LocalShare(share, heads, window_size, dilation) for dilation in dilations
        )
        self.attn_drop = make_attention_drop()
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        image = x.unflatten(1, context.size).permute(0, 3, 1, 2)
        parts = (self.global_dim, x.shape[-1] - self.global_dim)
        whole, local = self.query(x).split(parts, -1)
        reduced, image = image.split(parts, 1)
        outputs = [self.attend_whole(whole, reduced)]
        values = self.pointwise(self.depthwise(image).permute(0, 2, 3, 1))
        queries = local.unflatten(-1, (self.num_heads, len(self.shares), -1)).permute(3, 0, 2, 1, 4)
        for share, query, value in zip(
            self.shares, queries, values.chunk(len(self.shares), -1), strict=True
        ):
            outputs.append(share(query, value))
        return self.out_proj(torch.cat(outputs, -1))

    def attend_whole(self, query: Tensor, image: Tensor) -> Tensor:
        """Attention (B, N, C) of queries (B, N, C) to a map (B, C, H, W) that is made smaller."""
        # A map loses what a multiple of the stride leaves over, but a smaller one is padded.
        if min(image.shape[2:]) < self.reduction:
            bottom, right = (max(self.reduction - side, 0) for side in image.shape[2:])
            image = F.pad(image, (0, right, 0, bottom))
        reduced = self.reduce(image)
        tokens = self.norm(reduced.flatten(2).transpose(1, 2))
        key, value = self.key_value(tokens).chunk(2, -1)
        local = self.local(value.transpose(1, 2).unflatten(2, reduced.shape[2:]))
        value = value + local.flatten(2).transpose(1, 2)
        return attend(query[:, None], key[:, None], value[:, None], self.attn_drop)[:, 0]

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
