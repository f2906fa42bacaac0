"""Attention within cross-shaped windows (CSwin; arXiv:2107.00652, CVPR 2022)."""

from timm.models import register_notrace_module
from torch import Tensor

from ...kernels.rotary import Rotary
from ...kernels.window_attention import window_attention
from .place import Place
from .softmax import Softmax


@register_notrace_module
class CrossWindow(Softmax):
    """Softmax attention within stripes, vertical ones for half of the heads, horizontal the other.

    A depthwise 3 x 3 convolution of the values within each stripe is added (the paper's locally
    enhanced positional encoding), so rotary tables are not used. A map that is no multiple of
    the stripes is padded, half on either side, with tokens whose q, k and v are zero.

    Args:
        place: where the mixer stands.
        split_size: width s of the stripes in tokens; none for one window, the whole map.

    Raises:
        ValueError: if there are class tokens, which lie in no stripe, or the heads have no halves.
    """

    def __init__(self, place: Place, *, split_size: int | None = 7) -> None:
        if place.prefix_tokens:
            raise ValueError(
                f"stripes hold the tokens of a map, but {place.prefix_tokens} class tokens stand "
                "before it: take another mixer, or a skeleton without class tokens"
            )
        if split_size is not None and place.num_heads % 2:
            raise ValueError(
                f"num_heads is {place.num_heads}: one half of the heads attends in vertical "
                "stripes, the other in horizontal ones; split_size None has no stripes"
            )
        super().__init__(place, local_kernel=3)
        self.split_size = split_size

    def attend(self, projection: Tensor, size: tuple[int, int], rotary: Rotary | None) -> Tensor:
        if self.split_size is None:
            return super().attend(projection, size, None)
        height, width = size
        y = window_attention(
            projection.unflatten(1, size),
            heads=self.num_heads,
            windows=[(height, min(self.split_size, width)), (min(self.split_size, height), width)],
            padding="centre",
            weight=self.local.weight,
            bias=self.local.bias,
        )
        return y.flatten(1, 2)
