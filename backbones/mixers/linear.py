"""Linear attention of one template, of which each mechanism is three choices."""

from typing import ClassVar

from torch import Tensor

from ...kernels.linear_attention import linear_attention
from ...kernels.projected_linear_attention import projected_linear_attention
from ...kernels.rotary import Rotary
from .place import Place
from .projected import ProjectedMixer


class LinearMixer(ProjectedMixer):
    """Attention at a cost linear in the number of tokens; see `linsight.kernels`.

    Subclasses name the choices of `linear_attention`.
    """

    feature_map: ClassVar[str]
    key_weights: ClassVar[str] = "uniform"
    readout: ClassVar[str] = "normalized"

    def __init__(self, place: Place, *, gate: bool = True, local_kernel: int = 5) -> None:
        super().__init__(place, gate=gate, local_kernel=local_kernel)

    def attend(self, projection: Tensor, size: tuple[int, int], rotary: Rotary | None) -> Tensor:
        mechanism = {
            "feature_map": self.feature_map,
            "key_weights": self.key_weights,
            "readout": self.readout,
            "rotary": rotary,
        }
        if self.fused:
            return projected_linear_attention(
                projection.unflatten(1, size),
                self.local.weight,
                self.local.bias,
                heads=self.num_heads,
                **mechanism,
            ).flatten(1, 2)
        query, key, value, gate = self.unpack(projection)
        local = self.enhance(value, size)
        return linear_attention(query, key, value, local=local, gate=gate, **mechanism).flatten(2)
