"""The references of `layer_norm`, `rms_norm` and `add_layer_norm`, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.dispatch import without_autocast
from ..scaled_add.reference import scaled_add


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The norm over the last axis; see the public function."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x):
        norm = F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return norm.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm over the last axis; see the public function."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x):
        return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    scale: Tensor | None,
    keep: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The sum and its norm; see the public function."""
    total = scaled_add(x, branch, scale, keep)
    return total, layer_norm(total, weight, bias, eps)
