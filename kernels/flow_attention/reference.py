"""The reference of `flow_attention`, in plain PyTorch."""

import torch
from torch import Tensor

from ..runtime.dispatch import without_autocast

EPSILON = 1e-6


def flow_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The equations of the public function, as batched matrix products over heads."""
    dtype = query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    query, key, value = (x.transpose(1, 2).to(wide) for x in (query, key, value))
    with without_autocast(query):
        query, key = query.sigmoid(), key.sigmoid()
        incoming = 1 / flow(query, key.sum(-2, keepdim=True))
        outgoing = 1 / flow(key, query.sum(-2, keepdim=True))
        allocated = flow(query, outgoing.transpose(-2, -1) @ key).sigmoid()
        conserved = flow(key, incoming.transpose(-2, -1) @ query).clamp(-1, 1)
        competing = conserved.softmax(-2) * value.shape[-2]
        state = key.transpose(-2, -1) @ (value * competing)
        y = (query @ state) * (allocated * incoming)
    return y.to(dtype).transpose(1, 2).contiguous()


def flow(x: Tensor, total: Tensor) -> Tensor:
    """Of each token the flow to the others, as the authors keep it from zero.

    Args:
        x: (B, heads, N, D).
        total: (B, heads, 1, D), a sum over tokens.

    Returns:
        (x + e) . (total + e) + e of every token, (B, heads, N, 1).
    """
    total = total + EPSILON
    return x @ total.transpose(-2, -1) + EPSILON * (total.sum(-1, keepdim=True) + 1)
