"""The sums of 16-bit rows in a recorded backward pass, by the operator that reads them fast.

The gradient of a linear layer's bias is the sum of its result's gradient over the tokens, for which
PyTorch's kernel takes several times as long as its bytes need. A layer with its own gradient would
be another layer to whoever looks at it, with hooks, adapters or observers. A dispatch mode touches
no layer, and costs the host Python at every operator, which does not matter in a recording.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels.column_sum import column_sum

_SUM = torch.ops.aten.sum.dim_IntList
_NARROW = (torch.float16, torch.bfloat16)


class FastSums(TorchDispatchMode):
    """A context of a backward pass that gives sums over leading axes to `column_sum`.

    PyTorch's engine takes modes along to the threads that it differentiates in. It is not for
    forward passes: what asks whether a dispatch mode sees its calls runs its reference there.
    """

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if operator is _SUM and args[0].dtype in _NARROW:
            return _sum(*args, **kwargs)
        return operator(*args, **kwargs)


def _sum(
    x: Tensor,
    axes: list[int] | None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`torch.sum`, by `column_sum` where rows that lie one after the other are summed."""
    count = len(axes or ())
    leading = 0 < count < x.ndim and list(axes or ()) == list(range(count))
    if not leading or not x.is_contiguous() or not x.numel():
        return _SUM(x, axes, keepdim, dtype=dtype)
    kept = x.shape[count:]
    sums = column_sum(x.view(-1, kept.numel()), dtype=dtype)
    return sums.view((*[1] * count, *kept) if keepdim else kept)
