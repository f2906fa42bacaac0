"""Linear layers with a layer scale on the weights, whose training step costs the host little.

PyTorch's own products compute them. What is ours is the bookkeeping of a scale in eager training:
under autocast it is five kernels forward and eleven backward; here it is three and four, in one
node of the gradient's graph. Without a scale PyTorch's nodes, which are not in Python, are quicker.
A compiler sees `reference`, and fuses as it likes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import plain, rows_contiguous, runs_triton, stream_dtype


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
        scale is not None
        and torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in tensors)
        and runs_triton(x)
        and plain(tensors)
    ):
        return _ScaledLinear.apply(*tensors)
    return reference(*tensors)


def _scaled(vector: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale * vector along the first axis, in `dtype`."""
    result = torch.empty(vector.shape, dtype=dtype, device=vector.device)
    return torch.mul(vector, scale if vector.ndim == 1 else scale[:, None], out=result)


def _outer(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T x, (O, I) in float32."""
    if x.dtype == torch.float32:
        return grad.t() @ x
    if x.is_cuda:
        return torch.mm(grad.t(), x, out_dtype=torch.float32)
    return grad.t().float() @ x.float()


class _ScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale):
        dtype = stream_dtype(x)
        ctx.dtype = x.dtype
        x = rows_contiguous(x.to(dtype))
        factor = _scaled(weight, scale, dtype)
        ctx.save_for_backward(x, factor, weight, bias, scale)
        return F.linear(x, factor, None if bias is None else _scaled(bias, scale, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from . import linear_triton as kernels

        x, factor, weight, bias, scale = ctx.saved_tensors
        rows = rows_contiguous(grad).reshape(-1, grad.shape[-1])
        dx = dweight = dbias = dscale = None
        if ctx.needs_input_grad[0]:
            dx = (rows @ factor).view(x.shape).to(ctx.dtype)
        if any(ctx.needs_input_grad[1:]):
            dweight, dbias, dscale = kernels.unscale(
                _outer(rows, x.reshape(-1, x.shape[-1])),
                None if bias is None else kernels.column_sums(rows),
                weight,
                bias,
                scale,
            )
            dweight = dweight.to(weight.dtype)
        return dx, dweight, dbias, dscale
