"""The registration of `apply_rotary`; Triton is imported at the first launch."""

import torch

from ..runtime.dispatch import rows_contiguous
from ..runtime.operator import Operator
from ..runtime.program import cache_launches


@cache_launches
def _run(x, rows, columns, back):
    from .forward import forward

    x = rows_contiguous(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    forward(x, rows.contiguous(), columns.contiguous(), back, out)
    return out


def _save(ctx, inputs, output):
    _, rows, columns, ctx.back = inputs
    ctx.save_for_backward(rows, columns)


def _differentiate(ctx, grad):
    return turn(grad, *ctx.saved_tensors, not ctx.back), None, None, None


turn = Operator("rotary", _run, _save, _differentiate)
