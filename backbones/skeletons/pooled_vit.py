"""The plain Vision Transformer without a class token, as MHLA has it (arXiv:2601.07832)."""

from typing import Any, Literal

import torch.nn.functional as F
from timm.layers import global_pool_nlc
from timm.models import register_notrace_function
from torch import Tensor, nn
from torch.fx import Proxy

from ..context import Context
from ..layers import check_image
from ..norms import LayerNorm, NormLayer, resolve_norm_layer
from ..tracing import record_call
from .base import Size
from .vit import VisionTransformer


class Borders(nn.Module):
    """Images (B, in_chans, H, W), padded with zeros on all sides to a size that is little larger.

    Args:
        in_chans: channels of the images.
        size: (H, W) of the result. A side that is less than 7/8 of it is not padded.
    """

    def __init__(self, in_chans: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.in_chans, self.size = in_chans, size

    def forward(self, x: Tensor) -> Tensor:
        return pad_borders(check_image(x, self.in_chans), self.size)


@register_notrace_function
def pad_borders(x: Tensor, size: tuple[int, int]) -> Tensor:
    """See `Borders`."""
    if isinstance(x, Proxy):
        return record_call(pad_borders, x, size)
    height, width = (
        max(wanted - side, 0) if 8 * side >= 7 * wanted else 0
        for side, wanted in zip(x.shape[2:], size, strict=True)
    )
    if height or width:
        return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
    return x


class PooledVisionTransformer(VisionTransformer):
    """Patches, blocks of one width, the mean of all tokens, a norm and a linear head.

    Images that are up to an eighth smaller than the model's image size (224 for 256 pixels) are
    padded to it with zeros on all sides, so that maps are of the padded image. For other sizes the
    position embeddings are interpolated; the authors' code pads and crops those as well.

    Args:
        all: as in `VisionTransformer`. The pooling is 'avg' by default.

    Raises:
        ValueError: as in `VisionTransformer`.
    """

    def __init__(
        self,
        *args: Any,
        norm_layer: NormLayer | None = None,
        class_token: Literal[False] = False,
        **options: Any,
    ) -> None:
        super().__init__(*args, norm_layer=norm_layer, class_token=class_token, **options)
        self._set_borders()
        self.norm = nn.Identity()
        self.fc_norm = resolve_norm_layer(norm_layer, LayerNorm)(self.embed_dim)

    def _set_borders(self) -> None:
        height, width = self.size
        self.borders = Borders(self.in_chans, (self.patch_side * height, self.patch_side * width))

    def _resize_positions(self, img_size: Size) -> None:
        super()._resize_positions(img_size)
        self._set_borders()

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, Context]:
        """Images to the first block's tokens (B, H * W, C), and their context."""
        return super().forward_tokens(self.borders(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) from tokens; (B, C) if `pre_logits`."""
        x = global_pool_nlc(x, self.global_pool, num_prefix_tokens=self.num_prefix_tokens)
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)
