"""Norm-aware linear attention (NaLaFormer; arXiv:2506.21137, ICML 2026), and its softmax twin."""

from torch import Tensor, nn

from ..context import Context, Place
from ..norms import LayerNorm
from .base import register_mixer
from .linear import LinearAttention
from .projected import PackedAttention, ProjectedMixer, rename_entries
from .softmax import SoftmaxAttention


class NormGatedMixer(ProjectedMixer):
    """out_proj(norm(attention(q, k, v)) * silu(gate)) of one projection to q, k, v and the gate.

    Args:
        place: where the mixer stands.
        attention: the attention of q, k and v, with the local branch.
    """

    attention: PackedAttention

    def __init__(self, place: Place, attention: PackedAttention) -> None:
        super().__init__(place, attention, blocks=4)
        self.norm = LayerNorm(place.dim, eps=1e-5)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        channels = x.shape[-1]
        packed, gate = self.project(x, context).split((3 * channels, channels), -1)
        return self.out_proj(self.norm(self.attention(packed, context)) * self.act(gate))

    def init_weights(self, place: Place) -> None:
        super().init_weights(place)
        self.attention.init_local()

    def convert_checkpoint(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `qkvg`, `ln` and `lepe`, renamed."""
        entries = rename_entries(entries, {"qkvg.": "in_proj.", "ln.": "norm."})
        return super().convert_checkpoint(entries)


@register_mixer("nala")
class NormAware(NormGatedMixer):
    """Linear attention whose sharpness grows with the query's norm.

    The features of a query are its direction's positive and negative part to a power of its norm,
    those of a key the parts of its cube; both are rotated in the numerator alone.

    Args:
        place: where the mixer stands.
        local_kernel: size of the depthwise convolution of the values, odd; 0 for no convolution.
        rotary: see `LinearAttention`.
    """

    def __init__(self, place: Place, *, local_kernel: int = 5, rotary: bool = True) -> None:
        attention = LinearAttention(
            place,
            feature_map="norm_aware",
            key_weights="uniform",
            readout="normalized",
            gate=False,
            local_kernel=local_kernel,
            rotary=rotary,
        )
        super().__init__(place, attention)


@register_mixer("nala_softmax")
class NormGatedSoftmax(NormGatedMixer):
    """Softmax attention with the rotation, local branch, norm and gate of `NormAware`.

    Args:
        place: where the mixer stands.
        local_kernel: size of the depthwise convolution of the values, odd; 0 for no convolution.
    """

    def __init__(self, place: Place, *, local_kernel: int = 5) -> None:
        super().__init__(place, SoftmaxAttention(place, local_kernel=local_kernel, rotary=True))
