"""Polarity-aware linear attention (PolaFormer; arXiv:2501.15061, ICLR 2025)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.polarity_attention import polarity_attention
from ..context import Context, Place
from .base import register_mixer
from .positioned import PositionedAttention, PositionedMixer


class PolarityAttention(PositionedAttention):
    """(polarity_attention(q, k + positions, v) + conv(v)) * gate of a packed projection.

    Queries and keys are divided by s = softplus(`scale`), a learned number for each channel.

    Args:
        place: where the mixer stands.
        local_kernel: see `PositionedAttention`.
        range_of_power: alpha; the power p = 1 + alpha sigmoid(w) of each channel is within 1 and
            1 + alpha, w being learned.

    Raises:
        ValueError: if a head has an odd number of channels, or there is no local branch.
    """

    fused_features: Tensor | None

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
        # Powers and scales, which `fuse()` computes once.
        self.register_buffer("fused_features", None)

    def forward(self, projection: Tensor, context: Context) -> Tensor:
        blocks = projection.unflatten(-1, (4, self.num_heads, self.head_dim))
        query, key, value, gate = blocks.unbind(2)
        power, scale = self.powers_and_scales()
        return polarity_attention(
            query,
            key + self.key_positions(context, key),
            value,
            power,
            scale,
            local=self.local_branch(value, context.size),
            gate=gate,
        ).flatten(2)

    def powers_and_scales(self) -> tuple[Tensor, Tensor]:
        """Powers and scales of the features, (heads, D) each."""
        if self.fused_features is not None:
            return self.fused_features[0], self.fused_features[1]
        power = 1 + self.range_of_power * self.power.sigmoid()
        return power[0, :, 0], F.softplus(self.scale).view(self.num_heads, self.head_dim)

    def fuse(self) -> nn.Module:
        """This operator, which then holds its features' powers and scales, and all filters."""
        with torch.no_grad():
            self.fused_features = torch.stack(self.powers_and_scales())
        return super().fuse()


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

    def __init__(self, place: Place, *, local_kernel: int = 5, range_of_power: float = 4.0) -> None:
        attention = PolarityAttention(place, local_kernel, range_of_power)
        super().__init__(place, attention, blocks=4)

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
