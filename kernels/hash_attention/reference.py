"""The reference of `hash_attention`, in plain PyTorch."""

import torch
from torch import Tensor

from ..runtime.dispatch import without_autocast


def hash_attention(
    query: Tensor, value: Tensor, anchors: Tensor, means: Tensor, hyperplanes: Tensor
) -> Tensor:
    """The attention of `hash_queries`; see the public function."""
    dtype = query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    with without_autocast(query):
        query, value = (x.transpose(1, 2).to(wide) for x in (query, value))
        code = hash_queries(query, *(t.to(wide) for t in (anchors, means, hyperplanes)))
        weight = code.shape[-1] + 1
        state = code.transpose(-2, -1) @ value
        total = code.sum(-2, keepdim=True)
        normaliser = (code * total).sum(-1, keepdim=True) + weight * value.shape[-2]
        y = (code @ state + weight * value) / normaliser
    return y.transpose(1, 2).to(dtype).contiguous()


def hash_queries(query: Tensor, anchors: Tensor, means: Tensor, hyperplanes: Tensor) -> Tensor:
    """The codes (B, heads, N, b) of queries (B, heads, N, D), of elements -1, 0 and 1."""
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
