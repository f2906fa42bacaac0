"""The reference of `gaussian_attention`, in plain PyTorch."""

import torch
from torch import Tensor

from ..landmark_kernel.reference import gaussian_kernel
from ..runtime.dispatch import without_autocast


def gaussian_attention(
    query: Tensor,
    landmarks: Tensor,
    value: Tensor,
    inverse: Tensor,
    local: Tensor | None,
    scale: float,
) -> Tensor:
    """The equation as the paper writes it; see the public function."""
    dtype = query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    with without_autocast(query):
        query = scale * query.to(wide).transpose(1, 2)
        kernel = gaussian_kernel(query, landmarks.transpose(1, 2))
        gathered = kernel.mT @ value.to(wide).transpose(1, 2)
        y = (kernel @ (inverse.to(wide) @ gathered)).transpose(1, 2)
        if local is not None:
            y = y + local.to(wide)
    return y.to(dtype)
