"""The reference of `column_sum`, in plain PyTorch."""

import torch
from torch import Tensor


def column_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of the rows; see the public function."""
    # PyTorch converts to the dtype first, and sums half precision in float32.
    return x.sum(0, dtype=torch.promote_types(x.dtype, dtype)).to(dtype)
