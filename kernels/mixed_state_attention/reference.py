"""The reference of `mixed_state_attention`, in plain PyTorch."""

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.dispatch import without_autocast

EPSILON = 1e-6


def mixed_state_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    size: tuple[int, int],
    local: Tensor | None,
    prefix_tokens: int,
) -> Tensor:
    """The states, square by square; see the public function."""
    dtype = query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    squares = isqrt(len(mixing))
    with without_autocast(query):
        query, key = (x.to(wide).relu() + EPSILON for x in (query, key))
        value = value.to(wide)
        prefix = [x[:, :prefix_tokens].transpose(1, 2) for x in (query, key, value)]
        query, key, value = (
            split(x[:, prefix_tokens:], size, squares) for x in (query, key, value)
        )
        mixing = mixing.to(wide).expand(*value.shape[:2], -1, -1)
        states = key.transpose(-1, -2) @ value
        mixed = (mixing @ states.flatten(-2)).unflatten(-1, states.shape[-2:])
        normaliser = mixing @ (query * key.sum(-2, keepdim=True)).sum(-1)
        if prefix_tokens:
            front, theirs, values = prefix
            state, total = theirs.transpose(-1, -2) @ values, theirs.sum(-2, keepdim=True)
            mixed = mixed + state[:, :, None]
            normaliser = normaliser + (query * total[:, :, None]).sum(-1)
            state, total = state + states.sum(2), total + key.sum((2, 3))[:, :, None]
            front = front @ state / ((front * total).sum(-1, keepdim=True) + EPSILON)
        y = join(query @ mixed / (normaliser[..., None] + EPSILON), size, squares)
        if prefix_tokens:
            y = torch.cat((front.transpose(1, 2), y), 1)
        if local is not None:
            y = y + local.to(wide)
    return y.to(dtype)


def split(x: Tensor, size: tuple[int, int], squares: int) -> Tensor:
    """Tokens (B, H * W, heads, D) to squares (B, heads, squares^2, tokens of a square, D)."""
    x = x.unflatten(1, size)
    bottom, right = (-side % squares for side in size)
    # Comparing sizes would specialise the exported graph.
    if torch.compiler.is_exporting() or bottom or right:
        x = F.pad(x, (0, 0, 0, 0, 0, right, 0, bottom))
    x = x.unflatten(2, (squares, -1)).unflatten(1, (squares, -1))
    return x.permute(0, 5, 1, 3, 2, 4, 6).flatten(4, 5).flatten(2, 3)


def join(x: Tensor, size: tuple[int, int], squares: int) -> Tensor:
    """The inverse of `split`."""
    width = -(-size[1] // squares)
    x = x.unflatten(3, (-1, width)).unflatten(2, (squares, squares))
    x = x.permute(0, 2, 4, 3, 5, 1, 6).flatten(3, 4).flatten(1, 2)
    return x[:, : size[0], : size[1]].flatten(1, 2)
