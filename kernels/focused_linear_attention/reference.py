"""The reference of `focused_linear_attention`, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear_attention.reference import linear_attention
from ..runtime.dispatch import without_autocast

EPSILON = 1e-6


def focused_power(x: Tensor, scale: Tensor, power: int) -> Tensor:
    """The feature map of x (B, N, heads, D); see the public function."""
    t = (x.relu() + EPSILON) / F.softplus(scale).unflatten(0, x.shape[2:])
    # The norm of t^p may leave the range of float32; the norm of (t / max t)^p cannot.
    largest = t.detach().amax((-2, -1), keepdim=True)
    t = t / largest
    norms = [torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True) for y in (t, t**power)]
    return largest * norms[0] / norms[1] * t**power


def focused_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: Tensor, power: int, local: Tensor | None
) -> Tensor:
    """Feature map and attention, composed; see the public function."""
    wide = torch.promote_types(query.dtype, torch.float32)
    with without_autocast(query):
        q, k = (focused_power(x.to(wide), scale.to(wide), power) for x in (query, key))
        y = linear_attention(q, k, value, "identity", "uniform", "normalized", None, local, None)
    return y.to(query.dtype)
