"""The reference of `linear_attention`, in plain PyTorch."""

import torch
from torch import Tensor

from ..rotary.reference import apply_rotary
from ..runtime.dispatch import without_autocast

EPSILON = 1e-6
FLOOR = 100.0


def elementwise(x: Tensor, feature_map: str) -> Tensor:
    """phi(x) of an elementwise map; elu(x) + 1 is written so that it never rounds to zero."""
    if feature_map == "elu_plus_one":
        # Their gradients at zero are halves, whose sum is phi's: 1. CoreML wants an axis.
        zero = x.new_zeros(1)
        return torch.maximum(x, zero) + torch.minimum(x, zero).exp()
    if feature_map == "relu":
        return x.relu()
    if feature_map == "exp":
        return x.exp()
    return x


def norm_aware_query(query: Tensor) -> Tensor:
    """NaLaFormer's phi(q): the direction's positive and negative part, to a power of the norm."""
    norm = torch.linalg.vector_norm(query, dim=-1, keepdim=True)
    direction = query.abs() / norm.masked_fill(norm == 0, 1)
    return halves(query.sign() * direction ** (3 * (0.5 + norm.tanh())))


def halves(x: Tensor) -> Tensor:
    """(..., D) to (..., 2 D): the positive parts, then the negative parts."""
    return torch.cat((x.relu(), (-x).relu()), -1)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: str,
    key_weights: str,
    readout: str,
    rotary: tuple[Tensor, Tensor] | None,
    local: Tensor | None,
    gate: Tensor | None,
) -> Tensor:
    """The equations of the package's docstring as the papers write them."""
    dtype, tokens = query.dtype, max(1, query.shape[1])
    wide = torch.promote_types(dtype, torch.float32)
    with without_autocast(query):
        q, k, v = query.to(wide), key.to(wide), value.to(wide)
        if feature_map == "norm_aware":
            q, k = norm_aware_query(q), halves(k**3)
        else:
            q, k = elementwise(q, feature_map), elementwise(k, feature_map)
        width = value.shape[-1]
        scale = width**-0.5
        if key_weights == "global_query":
            # RALA, eq. 5: N times the softmax over tokens of the mean query against the keys.
            scores = scale * (q.mean(1, keepdim=True) * k).sum(-1, keepdim=True)
            weights = scores.softmax(1)
        else:
            weights = 1 / tokens
        # Dividing by N before the sum keeps half precision safe.
        k = k * weights
        normalizer = (q * k.sum(1, keepdim=True)).sum(-1, keepdim=True)
        if rotary is not None:
            # Each half of norm-aware features is turned as a head of its own.
            q, k = (
                apply_rotary(x.unflatten(-1, (-1, width)).flatten(2, 3), rotary).view_as(x)
                for x in (q, k)
            )
        # Batched matrix products over heads.
        state = k.permute(0, 2, 3, 1) @ v.permute(0, 2, 1, 3)
        y = (q.permute(0, 2, 1, 3) @ state).permute(0, 2, 1, 3)
        if readout == "normalized":
            y = y / (normalizer + EPSILON)
        elif readout == "summed":
            y = y / (normalizer + EPSILON / tokens)
        elif readout == "floored":
            y = y / normalizer.clamp(min=FLOOR / tokens)
        elif readout == "magnitude_aware":
            # MALA, eq. 8: beta = 1 + 1 / z multiplies, z times the mean value is subtracted.
            z = scale * normalizer
            y = scale * y * (1 + 1 / (z + EPSILON)) - z * v.mean(1, keepdim=True)
        else:
            # InLine, eq. 7: the weights of a query sum to one by subtraction.
            y = scale * y - (scale * normalizer - 1) * v.mean(1, keepdim=True)
        if local is not None:
            y = y + local.to(wide)
        if gate is not None:
            y = y * gate.to(wide)
    return y.to(dtype)
