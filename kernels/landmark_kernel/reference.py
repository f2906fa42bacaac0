"""The reference of `landmark_kernel`, in plain PyTorch."""

import torch
from torch import Tensor

from ..runtime.dispatch import without_autocast


def gaussian_kernel(a: Tensor, b: Tensor) -> Tensor:
    """exp(-|a_i - b_j|^2 / 2) of the rows of `a` (..., N, D) and `b` (..., M, D).

    Computed and returned in float32, or in float64 if `a` is, whatever autocast says:
    (..., N, M). SOFT (arXiv:2110.11945), eq. 3.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    with without_autocast(a):
        a, b = a.to(wide), b.to(wide)
        lengths = a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :]
        return torch.exp(a @ b.mT - 0.5 * lengths)


def landmark_kernel(landmarks: Tensor) -> Tensor:
    """The Gaussian kernel of each head's landmarks with themselves; see the public function."""
    x = landmarks.transpose(1, 2)
    return gaussian_kernel(x, x)
