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
        check_rotary(rotary, projection.shape[1] * projection.shape[2])
    tensors = (projection, weight, bias, *(rotary or ()))
    if (
        weight.shape[-1] not in TRITON_KERNELS
        or (rotary is not None and rotary[0].dtype != torch.float32)
        or not runs_triton(projection)
        or not plain(tensors)
    ):
        return reference(projection, weight, bias, heads, rotary)
    rows, columns = (None, None) if rotary is None else rotary
    *packed, local, gate = _unpack(projection, weight, bias, rows, columns, heads, overwrite)
    keep = torch.is_grad_enabled() and (local.requires_grad or gate.requires_grad)
    y = _finish(_attend(*packed), local, gate, keep)[0]
    return y.view(*projection.shape[:3], -1)


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


def _run_unpack(projection, weight, bias, rows, columns, heads, overwrite):
    from . import depthwise_conv_triton as convolution

    if overwrite and projection.requires_grad:
        # Whoever keeps the projection for a gradient of its own gets PyTorch's error.
        increment_version(projection)
    projection = rows_contiguous(projection.detach())
    both, value, gate = _blocks(projection, heads)
    local = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    value_map, local_map = (_map(x, projection.shape[1:3]) for x in (value, local))
    convolution.forward(value_map, weight.contiguous(), bias, 1, False, False, local_map)
    if rows is not None:
        # Beside each other in the projection, q and k turn in one pass.
        turned = (
            both if overwrite else torch.empty(both.shape, dtype=both.dtype, device=both.device)
        )
        _turn(both, rows, columns, False, turned)
        both = turned
    return *both.split(heads, 2), value, local, gate


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


def _run_finish(y, local, gate, keep):
    from . import projected_softmax_attention_triton as kernels

    out = torch.empty(local.shape, dtype=local.dtype, device=local.device)
    total = torch.empty_like(out) if keep else None
    kernels.finish(rows_contiguous(y), local, gate, out, total)
    return out, total


def _save_finish(ctx, inputs, output):
    ctx.save_for_backward(output[1], inputs[2])
    ctx.set_materialize_grads(False)


def _differentiate_finish(ctx, grad, _):
    from . import projected_softmax_attention_triton as kernels

    if grad is None:
        return None, None, None, None
    total, gate = ctx.saved_tensors
    dterms, dgate = torch.empty_like(total), torch.empty_like(total)
    kernels.finish_gradient(grad.contiguous(), total, gate, dterms, dgate)
    return dterms, dterms, dgate, None


_unpack = eager_function(
    "projected_softmax_unpack", _run_unpack, _save_unpack, _differentiate_unpack
)
_finish = eager_function(
    "projected_softmax_finish", _run_finish, _save_finish, _differentiate_finish
)
