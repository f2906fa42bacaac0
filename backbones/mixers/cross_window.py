"""Attention within cross-shaped windows (CSwin; arXiv:2107.00652, CVPR 2022)."""

import torch
from torch import Tensor

from ...kernels.window_attention import window_attention
from ..context import Context, Place
from .base import refuse_prefix_tokens, register_mixer
from .projected import ProjectedMixer
from .softmax import SoftmaxAttention


class CrossWindowAttention(SoftmaxAttention):
    """Softmax attention within stripes, with the convolution of the values within each stripe.

    Args:
        place: where the mixer stands.
        split_size: width s of the stripes in tokens, or None for one window, the whole map.
    """

    def __init__(self, place: Place, split_size: int | None) -> None:
        super().__init__(place, local_kernel=3)
        self.split_size = split_size

    def forward(self, projection: Tensor, context: Context) -> Tensor:
        if self.split_size is None:
            return super().forward(projection, context)
        height, width = context.size
        split = self.split_size
        y = window_attention(
            projection.unflatten(1, context.size),
            heads=self.num_heads,
            windows=[(height, min(split, width)), (min(split, height), width)],
            padding="centre",
            weight=self.local_weight,
            bias=self.local_bias,
            attn_drop=self.attn_drop,
        )
        return y.flatten(1, 2)


@register_mixer("cross_window")
class CrossWindow(ProjectedMixer):
    """Softmax attention within stripes: vertical for half of the heads, horizontal for the others.

    A depthwise 3 x 3 convolution of the values within each stripe is added (the paper's locally
    enhanced positional encoding). A map whose sides are not multiples of the stripes is padded,
    half on either side, with tokens whose q, k and v are zero.

    Args:
        place: where the mixer stands.
        split_size: width s of the stripes in tokens, or None for one window, the whole map.

    Raises:
        ValueError: if there are class tokens, which lie in no stripe, or if the number of heads
            is odd.
    """

    def __init__(self, place: Place, *, split_size: int | None = 7) -> None:
        refuse_prefix_tokens(place, "stripes hold the tokens of a map")
        if split_size is not None and place.num_heads % 2:
            raise ValueError(
                f"num_heads is {place.num_heads}: one half of the heads attends in vertical "
                "stripes, the other in horizontal ones; split_size None has no stripes"
            )
        super().__init__(place, CrossWindowAttention(place, split_size))

    def convert_checkpoint(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' convolutions of the vertical and of the horizontal stripes, joined."""
        entries = dict(entries)
        for kind in ("weight", "bias"):
            names = (f"attns.{i}.get_v.{kind}" for i in range(2))
            parts = [entries.pop(name) for name in names if name in entries]
            if parts:
                entries[f"get_v.{kind}"] = torch.cat(parts)
        return super().convert_checkpoint(entries)
