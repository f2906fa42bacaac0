"""Linear attention whose normaliser has a floor (L2ViT, arXiv:2501.16182)."""

import torch
from torch import Tensor, nn

from ...kernels.linear_attention import linear_attention
from ..context import Context, Place
from ..norms import is_plain
from .base import register_mixer
from .projected import PackedAttention, ProjectedMixer


class TemperedLinearAttention(PackedAttention):
    """t_h phi(q_i) . sum_j phi(k_j)^T v_j / max(phi(q_i) . sum_j phi(k_j), 100), phi = relu.

    The temperature t_h is learned for each head h. The floor is an absolute number, so that the
    result depends on how many tokens there are.

    Args:
        place: where the mixer stands.
    """

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        # A matrix, so that weight decay acts on it as in the authors' code.
        initial = torch.full((place.num_heads, 1), self.head_dim**-0.5)
        self.temperature: nn.Parameter | None = nn.Parameter(initial)

    def forward(self, projection: Tensor, context: Context) -> Tensor:
        query, key, value = projection.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        y = linear_attention(query, key, value, feature_map="relu", readout="floored")
        if self.temperature is not None:
            y = y * self.temperature.to(y.dtype)
        return y.flatten(2)


@register_mixer("linear_global")
class LinearGlobal(ProjectedMixer):
    """Linear attention over all tokens between projections; see `TemperedLinearAttention`.

    Args:
        place: where the mixer stands.
    """

    attention: TemperedLinearAttention

    def __init__(self, place: Place) -> None:
        super().__init__(place, TemperedLinearAttention(place))

    def convert_checkpoint(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' projections and temperature (heads, 1, 1)."""
        entries = super().convert_checkpoint(entries)
        if (temperature := entries.pop("temperature", None)) is not None:
            entries["attention.temperature"] = temperature.flatten(1)
        return entries

    def fuse(self) -> nn.Module:
        """This mixer, with the temperature multiplied into the output projection."""
        temperature = self.attention.temperature
        if temperature is not None and is_plain(self.out_proj):
            with torch.no_grad():
                self.out_proj.weight.mul_(temperature.expand(-1, self.attention.head_dim).flatten())
            self.attention.temperature = None
        return self
