"""Large kernel attention (VAN, arXiv:2202.09741): a gate that convolutions compute."""

from torch import Tensor, nn

from ..context import Context, Place
from ..initialization import init_as_convolution, init_convolutions
from ..layers import DepthwiseConv2d
from .base import refuse_prefix_tokens, register_mixer
from .projected import ProjectedMixer, rename_entries


class LargeKernelGate(nn.Module):
    """a * pointwise(dilated(local(a))) with a = gelu(x), at each token of a map.

    `local` is a depthwise convolution of 5 x 5 tokens, `dilated` one of 7 x 7 tokens that are 3
    apart, and `pointwise` a linear layer: together they see 23 x 23 tokens.

    Args:
        dim: channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.act = nn.GELU()
        self.local = DepthwiseConv2d(dim, 5)
        self.dilated = DepthwiseConv2d(dim, 7, dilation=3)
        self.pointwise = nn.Linear(dim, dim)

    def forward(self, projection: Tensor, context: Context) -> Tensor:
        """(B, H * W, C) to (B, H * W, C), tokens of the map of `context`."""
        x = self.act(projection)
        gate = self.dilated(self.local(x.unflatten(1, context.size).permute(0, 3, 1, 2)))
        return x * self.pointwise(gate.permute(0, 2, 3, 1).flatten(1, 2))


@register_mixer("large_kernel")
class LargeKernel(ProjectedMixer):
    """A `LargeKernelGate` between projections (eqs. 1 to 3).

    It has no heads. The shortcut around it in the authors' code is a part of VAN's block.

    Args:
        place: where the mixer stands.

    Raises:
        ValueError: if there are class tokens, which convolutions do not reach.
    """

    rotated_blocks = 0

    def __init__(self, place: Place) -> None:
        refuse_prefix_tokens(place, "convolutions take a map alone")
        super().__init__(place, LargeKernelGate(place.dim), blocks=1)

    def init_weights(self, place: Place) -> None:
        """All weights as those of convolutions: the authors' linear layers are such, of 1 x 1."""
        init_convolutions(self)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                init_as_convolution(layer)

    def convert_checkpoint(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' convolutions, renamed, and those of 1 x 1 as matrices."""
        gate = "spatial_gating_unit"
        names = {
            "proj_1.": "in_proj.",
            "proj_2.": "out_proj.",
            f"{gate}.conv0.": "attention.local.",
            f"{gate}.conv_spatial.": "attention.dilated.",
            f"{gate}.conv1.": "attention.pointwise.",
        }
        return {
            name: value.flatten(1) if value.shape[2:] == (1, 1) else value
            for name, value in rename_entries(entries, names).items()
        }
