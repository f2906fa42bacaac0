"""EcoFormer's attention through binary hash codes (arXiv:2209.09004, NeurIPS 2022)."""

import torch
from torch import Tensor

from ...kernels.hash_attention import hash_attention
from ..context import Context, Place
from .base import register_mixer
from .projected import PackedAttention, ProjectedMixer, rename_entries

HASH = "fast_attention.ksh."
# The authors' buffers, and their own axes of one element.
BUFFERS = {"anchor": ("anchors", 0), "mvec": ("means", (0, 2)), "A": ("hyperplanes", ())}


class HashAttention(PackedAttention):
    """`hash_attention` of queries and values, which are one packed projection.

    Anchors, means and hyperplanes are constants, which a checkpoint brings: the authors learn them
    before they fine-tune. Until then the anchors are zero, all codes are equal, and each token gets
    the mean of all.

    Args:
        place: where the mixer stands.
        bits: length b of the codes.
        anchors: number m of anchors.
    """

    anchors: Tensor
    means: Tensor
    hyperplanes: Tensor

    def __init__(self, place: Place, bits: int, anchors: int) -> None:
        super().__init__(place)
        heads, dim = self.num_heads, self.head_dim
        self.register_buffer("anchors", torch.zeros(heads, anchors, dim))
        self.register_buffer("means", torch.zeros(heads, anchors))
        self.register_buffer("hyperplanes", torch.randn(heads, bits, anchors))

    def forward(self, projection: Tensor, context: Context) -> Tensor:
        """Queries and values (B, N, 2 C) to (B, N, C)."""
        blocks = projection.unflatten(-1, (2, self.num_heads, self.head_dim))
        query, value = blocks.unbind(2)
        y = hash_attention(query, value, self.anchors, self.means, self.hyperplanes)
        return y.flatten(2)


@register_mixer("ecoformer")
class Ecoformer(ProjectedMixer):
    """`HashAttention` between projections, of which the first packs queries and values.

    Args:
        place: where the mixer stands.
        bits: length of the codes.
        anchors: number of anchors, to which distances are hashed.
    """

    rotated_blocks = 1

    def __init__(self, place: Place, *, bits: int = 16, anchors: int = 25) -> None:
        super().__init__(place, HashAttention(place, bits, anchors), blocks=2)

    def convert_checkpoint(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `to_qk`, `to_v`, `proj` and hash functions; a buffer of theirs is unused."""
        entries = dict(entries)
        entries.pop("fast_attention.projection_matrix", None)
        for kind in ("weight", "bias"):
            if f"to_qk.{kind}" in entries and f"to_v.{kind}" in entries:
                parts = (entries.pop(f"to_qk.{kind}"), entries.pop(f"to_v.{kind}"))
                entries[f"qkv.{kind}"] = torch.cat(parts)
        for theirs, (ours, single) in BUFFERS.items():
            if (value := entries.pop(HASH + theirs, None)) is not None:
                entries[f"attention.{ours}"] = value.squeeze(single)
        return rename_entries(entries, {})
