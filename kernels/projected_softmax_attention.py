"""Gated softmax attention of a packed projection, with its local branch: one gradient tensor.

The last stages of RAVLT and MAViT are softmax attention in the frame of their linear mixers: one
projection packs q, k, v and a gate. PyTorch's fused attention is the core. What is ours is the
bookkeeping around it in eager calls: rotation in place, sum and gate in one pass, and a gradient
that every kernel writes its slice of. A compiler sees `reference`, and fuses as it likes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from .backend import eager_function, plain, rows_contiguous, runs_triton
from .depthwise_conv import TRITON_KERNELS, depthwise_conv2d, empty_gradients
from .projected_attention import check_projection
from .rotary import Rotary, apply_rotary, check_rotary


def reference(
    projection: Tensor, weight: Tensor, bias: Tensor | None, heads: int, rotary: Rotary | None
) -> Tensor:
    """The composition of its parts; see `projected_softmax_attention`."""
    batch, height, width, channels = projection.shape
    # Split once: a slice of its own would have a gradient of the whole projection's size.
    both, value, gate = _blocks(projection, heads)
    query, key = (both if rotary is None else apply_rotary(both, rotary)).split(heads, 2)
    local = depthwise_conv2d(_map(value, (height, width)), weight, bias)
    y = (_attend(query, key, value) + local.reshape(value.shape)) * gate
    return y.reshape(batch, height, width, channels // 4)


def projected_softmax_attention(
    projection: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    heads: int,
    rotary: Rotary | None = None,
    overwrite: bool = False,
) -> Tensor:
    """(softmax(D^-0.5 q k^T) v + conv(v)) * gate, of a projection that packs q, k, v and the gate.

    The core of the softmax blocks of RAVLT (arXiv:2411.07635) and MAViT (arXiv:2507.00698) between
    their two projections; q and k are rotated first.

    Args:
        projection: (B, H, W, 4 C), the channel blocks q, k, v, gate in this order, each of
            `heads` heads; any strides with the last axis contiguous.
        weight, bias: of the local branch, as in `depthwise_conv2d`: (C, 1, k, k) and (C,).
        heads: number of heads; C is a multiple of it.
        rotary: tables of `rotary_tables` for H * W tokens, or none.
        overwrite: q and k may be rotated in place, which saves a copy of both until backward: of
            a projection that nothing else reads.

    Returns:
        (B, H, W, C) contiguous, in the dtype of `projection`.

    Raises:
        ValueError: if shapes disagree.
    """
    check_projection(projection, weight, heads)
    if rotary is not None:
        check_rotary(rotary, "projection", projection.shape[1] * projection.shape[2])
    tensors = (projection, weight, bias, *(rotary or ()))
    if (
        weight.shape[-1] not in TRITON_KERNELS
        or (rotary is not None and rotary[0].dtype != torch.float32)
        or not runs_triton(projection)
        or not plain(tensors)
    ):
        return reference(projection, weight, bias, heads, rotary)
    rows, columns = (None, None) if rotary is None else rotary
    *packed, branch, gate = _unpack(projection, weight, bias, rows, columns, heads, overwrite)
    vectors = (x if x is None else x.detach() for x in (weight, bias))
    y = _finish(_attend(*packed), branch, gate, *vectors, projection.shape[1:3])
    return _map(y, projection.shape[1:3])


def _blocks(x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of a packed map q and k, (B, N, 2 heads, D), and v and the gate, (B, N, heads, D)."""
    return x.flatten(1, 2).unflatten(-1, (4 * heads, -1)).split((2 * heads, heads, heads), 2)


def _map(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, N, heads, D) as a map (B, H, W, C)."""
    return rows_contiguous(x.flatten(2)).unflatten(1, size)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of (B, N, heads, D), by PyTorch."""
    return F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    ).transpose(1, 2)


# The Triton side. Triton itself is imported at the first launch, not before.


def _turn(x: Tensor, rows: Tensor | None, columns: Tensor | None, back: bool, out: Tensor) -> None:
    """Write `x`, (B, N, heads, D), to `out`: turned, turned back or, without tables, as it is."""
    from . import rotary_triton as kernels

    if rows is None:
        out.copy_(x)
    else:
        kernels.turn(rows_contiguous(x), rows.contiguous(), columns.contiguous(), back, out)


# Two autograd functions, PyTorch's attention between them. The local branch is not kept for the
# gate's gradient but computed again, as in `projected_linear_attention`: the first function gives
# the values a second time, for `_finish` to make the local branch of, and the gradient that comes
# back for them is the local branch's.


def _run_unpack(projection, weight, bias, rows, columns, heads, overwrite):
    if overwrite and projection.requires_grad:
        # Whoever keeps the projection for a gradient of its own gets PyTorch's error.
        increment_version(projection)
    both, value, gate = _blocks(rows_contiguous(projection.detach()), heads)
    if rows is not None:
        # Beside each other in the projection, q and k turn in one pass.
        turned = (
            both if overwrite else torch.empty(both.shape, dtype=both.dtype, device=both.device)
        )
        _turn(both, rows, columns, False, turned)
        both = turned
    return *both.split(heads, 2), value, value.detach(), gate


def _save_unpack(ctx, inputs, output):
    projection, weight, bias, rows, columns, ctx.heads, _ = inputs
    # Detached, too: autograd refuses a view that was written to.
    ctx.save_for_backward(projection.detach(), weight, rows, columns)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate_unpack(ctx, dquery, dkey, dvalue, dlocal, dgate):
    from . import depthwise_conv_triton as convolution

    projection, weight, rows, columns = ctx.saved_tensors
    projection = rows_contiguous(projection)
    total, dweight, dbias = empty_gradients(projection, weight)
    to_both, to_value, to_gate = _blocks(total, ctx.heads)
    for grad, to in zip((dquery, dkey), to_both.split(ctx.heads, 2), strict=True):
        _turn(grad, rows, columns, True, to)
    to_gate.copy_(dgate)
    maps = (_blocks(projection, ctx.heads)[1], dvalue, dlocal, to_value)
    value_map, dvalue, dlocal, to_value = (_map(x, projection.shape[1:3]) for x in maps)
    convolution.input_gradient(
        dlocal, value_map, weight.contiguous(), 1, False, False, to_value, dvalue
    )
    convolution.weight_gradient(dlocal, value_map, 1, False, dweight, dbias)
    dbias = None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)
    return total, dweight, dbias, None, None, None, None


def _convolve(branch: Tensor, weight: Tensor, bias: Tensor | None, size: torch.Size) -> Tensor:
    """The local branch of the values, (B, N, heads, D) contiguous."""
    from . import depthwise_conv_triton as convolution

    local = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    maps = _map(branch, size), _map(local, size)
    convolution.forward(maps[0], weight.contiguous(), bias, 1, False, False, maps[1])
    return local


def _run_finish(y, branch, gate, weight, bias, size):
    from . import projected_softmax_attention_triton as kernels

    local = _convolve(branch, weight, bias, size)
    kernels.finish(rows_contiguous(y), local, gate, local)
    return local


def _save_finish(ctx, inputs, output):
    y, branch, gate, weight, bias, ctx.size = inputs
    ctx.save_for_backward(y, branch, gate, weight, bias)


def _differentiate_finish(ctx, grad):
    from . import projected_softmax_attention_triton as kernels

    y, branch, gate, weight, bias = ctx.saved_tensors
    local = _convolve(branch, weight, bias, ctx.size)
    dterms = torch.empty(local.shape, dtype=local.dtype, device=local.device)
    # The gate's gradient takes the local branch's place.
    kernels.finish_gradient(grad.contiguous(), rows_contiguous(y), local, gate, dterms, local)
    return dterms, dterms, local, None, None, None


_unpack = eager_function(
    "projected_softmax_unpack", _run_unpack, _save_unpack, _differentiate_unpack
)
_finish = eager_function(
    "projected_softmax_finish", _run_finish, _save_finish, _differentiate_finish
)
