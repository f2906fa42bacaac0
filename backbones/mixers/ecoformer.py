"""EcoFormer's attention through binary hash codes (arXiv:2209.09004, NeurIPS 2022)."""

import torch
from torch import Tensor

from ...kernels.runtime.dispatch import without_autocast
from ..context import Context, Place
from .base import register_mixer
from .projected import PackedAttention, ProjectedMixer, rename_entries

HASH = "fast_attention.ksh."
# The authors' buffers, and their own axes of one element.
BUFFERS = {"anchor": ("anchors", 0), "mvec": ("means", (0, 2)), "A": ("hyperplanes", ())}


class HashAttention(PackedAttention):
    """Linear attention between binary codes of b bits, which queries and keys share.

    Per head, with u_i the query of token i divided by its length, m anchors a_j and s the mean of
    all squared distances |u_i - a_j|^2 in the image,

    c_i = sign(A (exp(-|u_i - a_j|^2 / (2 s)) - mean_j)_j)
    y_i = (c_i sum_j c_j^T v_j + (b + 1) v_i) / (c_i . sum_j c_j + N (b + 1)).

    In the backward pass a sign has the gradient of the identity where its argument is within -1
    and 1. Sums are in float32 or wider. Anchors, means and A are constants, which a checkpoint
    brings: the authors learn them before they fine-tune. Until then the anchors are zero, all codes
    are equal, and each token gets the mean of all.

    Args:
        place: where the mixer stands.
        bits: b.
        anchors: m.
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
        dtype = projection.dtype
        wide = torch.promote_types(dtype, torch.float32)
        blocks = projection.unflatten(-1, (2, self.num_heads, self.head_dim))
        query, value = blocks.permute(2, 0, 3, 1, 4).to(wide).unbind()
        with without_autocast(projection):
            code = self.hash(query)
            weight = code.shape[-1] + 1
            state = code.transpose(-2, -1) @ value
            total = code.sum(-2, keepdim=True).transpose(-2, -1)
            y = (code @ state + weight * value) / (code @ total + weight * value.shape[-2])
        return y.to(dtype).transpose(1, 2).flatten(2)

    def hash(self, query: Tensor) -> Tensor:
        """The codes (B, heads, N, b) of queries (B, heads, N, D), of elements -1, 0 and 1."""
        anchors, means, hyperplanes = (
            t.to(query.dtype) for t in (self.anchors, self.means, self.hyperplanes)
        )
        length = torch.linalg.vector_norm(query, dim=-1, keepdim=True)
        # A query of zeros has no direction, and stays as it is.
        direction = query / length.masked_fill(length == 0, 1)
        products = direction @ anchors.transpose(-2, -1)
        distance = 1 - 2 * products + anchors.square().sum(-1)[:, None]
        kernel = torch.exp(distance / (-2 * distance.mean((-2, -1), keepdim=True)))
        sides = (kernel - means[:, None]) @ hyperplanes.transpose(-2, -1)
        if not sides.requires_grad:
            return sides.sign()
        passed = sides.masked_fill(sides.abs() >= 1, 0)
        return sides.sign().detach() + (passed - passed.detach())


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
