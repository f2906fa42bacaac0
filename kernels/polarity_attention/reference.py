"""The reference of `polarity_attention`, in plain PyTorch."""

import torch
from torch import Tensor

from ..linear_attention.reference import EPSILON, halves
from ..runtime.dispatch import without_autocast


def polarity_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    power: Tensor,
    scale: Tensor,
    local: Tensor | None,
    gate: Tensor | None,
) -> Tensor:
    """The equations of the public function."""
    dtype, width = query.dtype, query.shape[-1]
    wide = torch.promote_types(dtype, torch.float32)
    with without_autocast(query):
        power, scale = power.to(wide), scale.to(wide)
        query, key = (signed_power(x.to(wide), power, scale) for x in (query, key))
        key = key / key.shape[1]
        # Queries with their halves exchanged read a state whose halves are exchanged instead.
        state = key.permute(0, 2, 3, 1) @ value.to(wide).transpose(1, 2)
        same, opposite = state.split(width // 2, -1)
        mean = key.sum(1)[..., None]
        state = torch.cat((same, opposite.roll(width, -2), mean, mean.roll(width, -2)), -1)
        y = (query.transpose(1, 2) @ state).transpose(1, 2)
        y, normalizers = y.split((width, 2), -1)
        y = y.unflatten(-1, (2, width // 2)) / (normalizers[..., None] + EPSILON)
        y = y.flatten(-2)
        if local is not None:
            y = y + local.to(wide)
        if gate is not None:
            y = y * gate.to(wide)
    return y.to(dtype)


def signed_power(x: Tensor, power: Tensor, scale: Tensor) -> Tensor:
    """[relu(x / s)^p, relu(-x / s)^p] of x (B, N, heads, D), 2 D channels."""
    return halves(x.sign() * (x / scale).abs() ** power)
