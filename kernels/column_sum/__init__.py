"""The sum of rows, which in a backward pass is a bias's gradient.

PyTorch's sum of 16-bit rows takes several times as long as its bytes need (docs/performance.md). A
compiler sees the reference, which it fuses with what stands around it.
"""

import torch
from torch import Tensor

from ..runtime.dispatch import TRITON_DTYPES, is_direct_call, runs_triton
from . import operator, reference

# As many rows as a batch has images, such as those of a classifier's head, are left to PyTorch's
# one launch: there is little to share out, and numbers of classes need machine code of their own.
MOST_ROWS_LEFT = 512


def column_sum(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """sum_n x[n, c], taken in float32 or wider and rounded once.

    Args:
        x: (N, C), any floating dtype; the kernels read it in place where it is contiguous.
        dtype: of the result; None for that of `x`.

    Returns:
        (C,) in `dtype`, under autocast too.

    Raises:
        ValueError: if `x` has another number of axes.
    """
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (N, C): flatten the rows first")
    args = (x, x.dtype if dtype is None else dtype)
    usable = x.shape[0] > MOST_ROWS_LEFT and args[1] in TRITON_DTYPES
    if not usable or not runs_triton(x) or not is_direct_call(args, "column_sum"):
        return reference.column_sum(*args)
    return operator.column_sum(*args)
