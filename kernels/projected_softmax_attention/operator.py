"""The launches of `projected_softmax_attention`; Triton is imported at the first launch.

Two autograd functions have PyTorch's attention between them. The local branch is not kept for the
gate's gradient but computed again, as in `projected_linear_attention`: the first function gives
the values a second time, for `_finish` to make the local branch of, and the gradient that comes
back for them is the local branch's.
"""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..depthwise_conv2d.operator import empty_gradients
from ..rotary import Rotary
from ..runtime.dispatch import rows_contiguous
from ..runtime.operator import Operator
from ..runtime.program import cache_launches
from .reference import attend, split_blocks, to_map


def _turn(x: Tensor, rows: Tensor | None, columns: Tensor | None, back: bool, out: Tensor) -> None:
    """Write `x`, (B, N, heads, D), to `out`: turned, turned back or, without tables, unchanged."""
    from ..rotary.forward import forward

    if rows is None or columns is None:
        out.copy_(x)
    else:
        forward(rows_contiguous(x), rows.contiguous(), columns.contiguous(), back, out)


@cache_launches
def _run_turn(x, rows, columns, overwrite):
    """`x`, (B, N, heads, D), turned, in place or not."""
    out = x if overwrite else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _turn(x, rows, columns, False, out)
    return out


def _run_unpack(projection, weight, bias, rows, columns, heads, overwrite):
    if overwrite and projection.requires_grad:
        # An operation that saved the projection for its own gradient gets PyTorch's error.
        increment_version(projection)
    both, value, gate = split_blocks(rows_contiguous(projection.detach()), heads)
    if rows is not None:
        # q and k, which lie beside each other in the projection, turn in one pass.
        both = _run_turn(both, rows, columns, overwrite)
    return *both.split(heads, 2), value, value.detach(), gate


def _save_unpack(ctx, inputs, output):
    projection, weight, bias, rows, columns, ctx.heads, _ = inputs
    # It is detached because autograd refuses a view that was written to.
    ctx.save_for_backward(projection.detach(), weight, rows, columns)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate_unpack(ctx, dquery, dkey, dvalue, dlocal, dgate):
    gradients = _run_unpack_backward(
        dquery, dkey, dvalue, dlocal, dgate, *ctx.saved_tensors, ctx.heads, ctx.bias_dtype
    )
    return *gradients, None, None, None, None


@cache_launches
def _run_unpack_backward(
    dquery, dkey, dvalue, dlocal, dgate, projection, weight, rows, columns, heads, bias_dtype
):
    """The gradients of projection, weight and bias."""
    from ..depthwise_conv2d.convolution import input_gradient
    from ..depthwise_conv2d.weight_gradient import weight_gradient

    projection = rows_contiguous(projection)
    total, dweight, dbias = empty_gradients(projection, weight)
    to_both, to_value, to_gate = split_blocks(total, heads)
    for grad, to in zip((dquery, dkey), to_both.split(heads, 2), strict=True):
        _turn(grad, rows, columns, True, to)
    to_gate.copy_(dgate)
    maps = (split_blocks(projection, heads)[1], dvalue, dlocal, to_value)
    value_map, dvalue, dlocal, to_value = (to_map(x, projection.shape[1:3]) for x in maps)
    input_gradient(dlocal, value_map, weight.contiguous(), 1, None, False, to_value, dvalue)
    weight_gradient(dlocal, value_map, 1, None, dweight, dbias)
    return total, dweight, None if bias_dtype is None else dbias.to(bias_dtype)


def _convolve(branch: Tensor, weight: Tensor, bias: Tensor | None, size: torch.Size) -> Tensor:
    """The local branch of the values, (B, N, heads, D) contiguous."""
    from ..depthwise_conv2d.convolution import forward

    local = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    maps = to_map(branch, size), to_map(local, size)
    forward(maps[0], weight.contiguous(), rows_contiguous(bias), 1, None, False, maps[1])
    return local


@cache_launches
def _run_finish(y, branch, gate, weight, bias, size):
    from .epilogue import finish

    local = _convolve(branch, weight, bias, size)
    finish(rows_contiguous(y), local, gate, local)
    return local


def _save_finish(ctx, inputs, output):
    y, branch, gate, weight, bias, ctx.size = inputs
    ctx.save_for_backward(y, branch, gate, weight, bias)


def _differentiate_finish(ctx, grad):
    return *_run_finish_backward(grad, *ctx.saved_tensors, ctx.size), None, None, None


@cache_launches
def _run_finish_backward(grad, y, branch, gate, weight, bias, size):
    """The gradients of attention, local branch and gate."""
    from .epilogue import finish_gradient

    local = _convolve(branch, weight, bias, size)
    dterms = torch.empty(local.shape, dtype=local.dtype, device=local.device)
    # The gate's gradient overwrites the local branch.
    finish_gradient(grad.contiguous(), rows_contiguous(y), local, gate, dterms, local)
    return dterms, dterms, local


_unpack = Operator("projected_softmax_unpack", _run_unpack, _save_unpack, _differentiate_unpack)
_finish = Operator("projected_softmax_finish", _run_finish, _save_finish, _differentiate_finish)


def projected_softmax_attention(
    projection: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rotary: Rotary | None,
    heads: int,
    overwrite: bool,
) -> Tensor:
    """The composition of the two functions with PyTorch's attention; see the public function."""
    rows, columns = (None, None) if rotary is None else rotary
    *packed, branch, gate = _unpack(projection, weight, bias, rows, columns, heads, overwrite)
    vectors = (x if x is None else x.detach() for x in (weight, bias))
    y = _finish(attend(*packed), branch, gate, *vectors, projection.shape[1:3])
    return to_map(y, projection.shape[1:3])
