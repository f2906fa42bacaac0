"""Linear layers whose training step costs the host little, with a layer scale on the weights.

PyTorch's own products compute them. What is ours is the bookkeeping around them in eager
training: under autocast `F.linear` is three calls and three nodes of the gradient's graph (two
casts and the product), six more kernels backward, and a scale on the weights doubles both. Here
it is one node; weight gradients leave their product in float32, and biases' and scales' are
summed by one kernel. A compiler sees `reference`, and fuses as it likes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import plain, rows_contiguous, runs_triton


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """See `linear`."""
    if scale is not None:
        weight = scale[:, None] * weight
        bias = None if bias is None else scale * bias
    return F.linear(x, weight, bias)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, scale: Tensor | None = None
) -> Tensor:
    """scale * (x W^T + b), with the layer scale (arXiv:2103.17239) applied to W and b.

    So nothing of the size of x is moved or kept for the scale.

    Args:
        x: (..., I), of any floating dtype.
        weight: (O, I).
        bias: (O,), or none.
        scale: (O,), or none.

    Returns:
        (..., O), in the dtype of `x`, or autocast's.

    Raises:
        RuntimeError: by PyTorch, if shapes disagree.
    """
    tensors = (x, weight, bias, scale)
    if (
        torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in tensors)
        and runs_triton(x)
        and plain(tensors)
    ):
        return _Linear.apply(*tensors)
    return reference(*tensors)


def _stream_dtype(x: Tensor) -> torch.dtype:
    """What PyTorch multiplies in: autocast's dtype where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _scaled(vector: Tensor | None, scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """scale * vector along the first axis, in `dtype`."""
    if vector is None or scale is None:
        return vector if vector is None else vector.to(dtype)
    result = torch.empty(vector.shape, dtype=dtype, device=vector.device)
    return torch.mul(vector, scale if vector.ndim == 1 else scale[:, None], out=result)


def _outer(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T x, (O, I) in float32."""
    if x.dtype == torch.float32:
        return grad.t() @ x
    if x.is_cuda:
        return torch.mm(grad.t(), x, out_dtype=torch.float32)
    return grad.t().float() @ x.float()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale):
        dtype = _stream_dtype(x)
        ctx.dtype = x.dtype
        x = rows_contiguous(x.to(dtype))
        factor = _scaled(weight, scale, dtype)
        # Only a scale's gradient asks for the vectors again.
        kept = (None, None, None) if scale is None else (weight, bias, scale)
        ctx.save_for_backward(x, factor, *kept)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return F.linear(x, factor, _scaled(bias, scale, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, factor, weight, bias, scale = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_scale = ctx.needs_input_grad
        rows = rows_contiguous(grad).reshape(-1, grad.shape[-1])
        dx = dweight = dbias = dscale = None
        if needs_x:
            dx = (rows @ factor).view(x.shape).to(ctx.dtype)
        if needs_weight or needs_scale:
            dweight = _outer(rows, x.reshape(-1, x.shape[-1]))
        if needs_bias or needs_scale:
            from . import linear_triton as kernels

            sums = kernels.column_sums(rows)
            if needs_scale:
                dweight, dbias, dscale = kernels.unscale(dweight, sums, weight, bias, scale)
            else:
                dbias = sums.sum(0)
        if scale is not None and not needs_scale:
            dweight = None if dweight is None else dweight * scale[:, None]
            dbias = None if dbias is None else dbias * scale
        return (
            dx,
            dweight.to(ctx.dtypes[0]) if needs_weight else None,
            dbias.to(ctx.dtypes[1]) if needs_bias else None,
            dscale,
        )
