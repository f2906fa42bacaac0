"""Spatial-reduction attention of the Pyramid Vision Transformer (arXiv:2102.12122, ICCV 2021)."""

from functools import partial

import torch
from torch import Tensor, nn

from ..context import Context, Place
from ..layers import pad_to_multiple
from ..norms import LayerNorm, NormLayer, fold_into_convolution, resolve_norm_layer
from .attention_map import attend, make_attention_drop
from .base import TokenMixer, register_mixer
from .projected import rename_entries

AUTHORS_NAMES = {"q.": "query.", "kv.": "key_value.", "sr.": "reduce."}


@register_mixer("spatial_reduction")
class SpatialReduction(TokenMixer):
    """Softmax attention to keys and values of a map that a strided convolution has made smaller.

    softmax(D^-0.5 q k^T) v with q = x Wq and k, v = LayerNorm(conv(x)) Wkv (eqs. 1-4), where
    conv has size and stride R; sides that R does not divide are padded with zeros. Prefix tokens
    pass the convolution by: they stand before the reduced map, as in MViT (arXiv:2104.11227).

    Args:
        place: where the mixer stands.
        reduction: R, at least 2 (without reduction it is the mixer 'softmax').
        norm_layer: what stands in the place of the layer norm: a class, a partial of one or a
            name, or None for none other.

    Raises:
        ValueError: if `reduction` is below 2.
    """

    def __init__(
        self, place: Place, *, reduction: int = 2, norm_layer: NormLayer | None = None
    ) -> None:
        super().__init__()
        if reduction < 2:
            raise ValueError(
                f"reduction is {reduction}, expected at least 2: without one, use 'softmax'"
            )
        dim = place.dim
        self.prefix_tokens = place.prefix_tokens
        self.num_heads = place.num_heads
        self.query = nn.Linear(dim, dim)
        self.reduce = nn.Conv2d(dim, dim, reduction, stride=reduction)
        self.norm = resolve_norm_layer(norm_layer, partial(LayerNorm, eps=1e-5))(dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.attn_drop = make_attention_drop()
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, P + H * W, C) to (B, P + H * W, C)."""
        image = x[:, self.prefix_tokens :].unflatten(1, context.size).permute(0, 3, 1, 2)
        image = pad_to_multiple(image, self.reduce.stride[0])
        reduced = self.reduce(image)
        size = reduced.shape[2], reduced.shape[3]
        reduced = reduced.flatten(2).transpose(1, 2)
        if self.prefix_tokens:
            reduced = torch.cat((x[:, : self.prefix_tokens].to(reduced.dtype), reduced), 1)
        reduced = self.norm(reduced)
        query = context.rotate(self.query(x).unflatten(-1, (self.num_heads, -1)))
        key, value = self.key_value(reduced).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        if context.rotary_temperature is not None:
            # A key's place is the middle of what the convolution has read.
            temperature = context.rotary_temperature
            key = Context(size, self.prefix_tokens, rotary_temperature=temperature).rotate(key)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        y = attend(query, key, value, self.attn_drop)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def fuse(self) -> nn.Module:
        """This mixer, whose convolution has taken in the norm, if that is constant.

        It keeps the norm where prefix tokens pass the convolution by.
        """
        if self.prefix_tokens:
            return self
        self.norm = fold_into_convolution(self.norm, self.reduce)
        return self

    def convert_checkpoint(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `q`, `kv`, `sr` and `proj`, renamed."""
        return rename_entries(entries, AUTHORS_NAMES)
