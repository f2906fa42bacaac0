"""The reference of `scaled_add`, in plain PyTorch."""

import torch
from torch import Tensor

from ..runtime.dispatch import without_autocast


def scaled_add(
    x: Tensor, branch: Tensor, scale: Tensor | None, keep: Tensor | None = None
) -> Tensor:
    """x + keep * scale * branch, each factor 1 if it is None; see the public function."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x):
        term = branch.to(wide)
        if scale is not None:
            term = scale.to(wide) * term
        if keep is not None:
            term = keep.detach().to(wide) * term
        return (x.to(wide) + term).to(x.dtype)
