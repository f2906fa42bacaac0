"""Polarity-aware linear attention (PolaFormer; arXiv:2501.15061, ICLR 2025)."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.runtime.dispatch import without_autocast
from ..context import Context, Place
from ..norms import is_plain
from .base import register_mixer
from .positioned import PositionedAttention, PositionedMixer

EPSILON = 1e-6


def polarity_attention(query: Tensor, key: Tensor, value: Tensor, power: Tensor) -> Tensor:
    """Linear attention whose values are summed, half and half, over keys of either sign.

    With x+ = relu(x)^p and x- = relu(-x)^p, in each head the first half of the channels is the
    linear attention of the queries [q+, q-] and keys [k+, k-], the second half that of the queries
    [q-, q+] and the same keys (eqs. 5 to 7), each normalised by itself.

    Args:
        query, key, value: (B, N, heads, D), D even.
        power: p, (heads, D), above 1.

    Returns:
        (B, N, heads, D) in the dtype of `query`; computed in float32 or wider.
    """
    dtype, width = query.dtype, query.shape[-1]
    wide = torch.promote_types(dtype, torch.float32)
    with without_autocast(query):
        power = power.to(wide)
        query, key = (split_signs(x.to(wide), power) for x in (query, key))
        # Queries with their halves exchanged read a state whose halves are exchanged instead.
        key = key / key.shape[1]
        state = key.permute(0, 2, 3, 1) @ value.to(wide).transpose(1, 2)
        same, opposite = state.split(width // 2, -1)
        mean = key.sum(1)[..., None]
        state = torch.cat((same, opposite.roll(width, -2), mean, mean.roll(width, -2)), -1)
        y = (query.transpose(1, 2) @ state).transpose(1, 2)
        y, normalizers = y.split((width, 2), -1)
        y = y.unflatten(-1, (2, width // 2)) / (normalizers[..., None] + EPSILON)
    return y.flatten(-2).to(dtype)


def split_signs(x: Tensor, power: Tensor) -> Tensor:
    """[relu(x)^p, relu(-x)^p] of x (..., D), 2 D channels."""
    x = x.sign() * x.abs() ** power
    return torch.cat((x.relu(), (-x).relu()), -1)


class PolarityAttention(PositionedAttention):
    """(polarity_attention(q / s, (k + positions) / s, v) + conv(v)) * gate of a packed projection.

    Args:
        place: where the mixer stands.
        local_kernel: see `PositionedAttention`.
        range_of_power: alpha; the power p = 1 + alpha sigmoid(w) of each channel is within 1 and
            1 + alpha, w being learned.

    Raises:
        ValueError: if a head has an odd number of channels, or there is no local branch.
    """

    scale: nn.Parameter | None

    def __init__(self, place: Place, local_kernel: int, range_of_power: float) -> None:
        super().__init__(place, local_kernel)
        if self.head_dim % 2:
            raise ValueError(
                f"heads have {self.head_dim} channels, an odd number: one half of the values is "
                "for either sign; choose another number of heads"
            )
        self.range_of_power = range_of_power
        # Their ranks are such that weight decay acts on them, as in the authors' code.
        self.scale = nn.Parameter(torch.zeros(1, 1, place.dim))
        self.power = nn.Parameter(torch.zeros(1, place.num_heads, 1, self.head_dim))

    def forward(self, projection: Tensor, context: Context) -> Tensor:
        blocks = projection.unflatten(-1, (4, self.num_heads, self.head_dim))
        query, key, value, gate = blocks.unbind(2)
        key = key + self.key_positions(context, key)
        if self.scale is not None:
            inverse = self.inverse_scale(self.scale).to(query.dtype)
            query, key = query * inverse, key * inverse
        power = 1 + self.range_of_power * self.power.sigmoid()
        y = polarity_attention(query, key, value, power[0, :, 0])
        # There always is a local branch.
        y = y + cast(Tensor, self.local_branch(value, context.size))
        return (y * gate).flatten(2)

    def inverse_scale(self, scale: Tensor) -> Tensor:
        """1 / s, (heads, D), of the scale s = softplus(`scale`) of queries and keys."""
        return 1 / F.softplus(scale).view(self.num_heads, self.head_dim)


@register_mixer("polarity")
class Polarity(PositionedMixer):
    """Polarity-aware linear attention between projections; see `PolarityAttention`.

    Args:
        place: where the mixer stands.
        local_kernel: size of the depthwise convolution of the values, odd, whose filters all
            heads share.
        range_of_power: how far above 1 the learned powers of the features reach.

    Raises:
        ValueError: if a head has an odd number of channels, or there is no local branch.
    """

    attention: PolarityAttention

    def __init__(self, place: Place, *, local_kernel: int = 5, range_of_power: float = 4.0) -> None:
        attention = PolarityAttention(place, local_kernel, range_of_power)
        super().__init__(place, attention, blocks=4)

    def fuse(self) -> nn.Module:
        """This mixer, with the scale of queries and keys multiplied into their projection."""
        scale = self.attention.scale
        if is_plain(self.in_proj) and scale is not None:
            with torch.no_grad():
                inverse = self.attention.inverse_scale(scale).flatten()
                rows = torch.cat((inverse, inverse))
                self.in_proj.weight[: len(rows)].mul_(rows[:, None])
                self.in_proj.bias[: len(rows)].mul_(rows)
                self.attention.position.mul_(inverse)
            self.attention.scale = None
        return self

    def convert_checkpoint(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' entries: `qkvg`, or `qg` and `kv` joined in its order, and the rest."""
        entries = {
            f"attention.{name}" if name in ("scale", "power") else name: value
            for name, value in entries.items()
        }
        for kind in ("weight", "bias"):
            if f"qg.{kind}" in entries:
                query, gate = entries.pop(f"qg.{kind}").chunk(2)
                entries[f"qkvg.{kind}"] = torch.cat((query, entries.pop(f"kv.{kind}"), gate))
            if f"qkvg.{kind}" in entries:
                entries[f"in_proj.{kind}"] = entries.pop(f"qkvg.{kind}")
        return super().convert_checkpoint(entries)
