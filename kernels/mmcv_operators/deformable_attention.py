"""Multi-scale deformable attention (Zhu et al., 2021, equation 3), and its gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.dispatch import runs_triton, without_autocast
from ..runtime.operator import Operator
from .autograd import accumulator, gradients


def reference(value: Tensor, shapes: list[list[int]], locations: Tensor, weights: Tensor) -> Tensor:
    """The attention through PyTorch's `grid_sample`; see `ms_deform_attn_forward`."""
    batch, queries, heads, _, points, _ = locations.shape
    width = value.shape[-1]
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
    levels = value.permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in shapes], dim=-1)
    sampled = [
        F.grid_sample(level.unflatten(-1, shape), grids[:, :, i], align_corners=False)
        for i, (level, shape) in enumerate(zip(levels, shapes, strict=True))
    ]  # of each level (B M, D, Q, P)
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, len(shapes) * points)
    out = (torch.cat(sampled, dim=-1) * weights).sum(-1)
    return out.view(batch, heads * width, queries).mT


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """For each query and head, the weighted sum of bilinear samples of the levels' maps.

    Args:
        value: (B, S, M, D), the L levels' maps one behind the other, row by row.
        value_spatial_shapes: (L, 2), rows and columns of each level.
        value_level_start_index: (L,), where in S each level starts.
        sampling_locations: (B, Q, M, L, P, 2), x before y, 0 to 1 across the map; samples
            outside are zero.
        attention_weights: (B, Q, M, L, P).
        im2col_step: mmcv's, of no effect here.

    Returns:
        (B, Q, M D), in the dtype of `value`; sums are in float32 or wider.
    """
    if runs_triton(value):
        return _attention(
            value,
            value_spatial_shapes,
            value_level_start_index,
            sampling_locations,
            attention_weights,
        )
    dtype = accumulator(value)
    tensors = (x.to(dtype) for x in (sampling_locations, attention_weights))
    with without_autocast(value):
        out = reference(value.to(dtype), value_spatial_shapes.tolist(), *tensors)
    return out.to(value.dtype).contiguous()


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """The gradients of `ms_deform_attn_forward` in the values, the locations and the weights."""
    if runs_triton(value):
        found = _attention_backward(
            grad_output,
            value,
            value_spatial_shapes,
            value_level_start_index,
            sampling_locations,
            attention_weights,
        )
    else:
        dtype = accumulator(value)
        shapes = value_spatial_shapes.tolist()
        found = gradients(
            lambda value, locations, weights: reference(value, shapes, locations, weights),
            [x.to(dtype) for x in (value, sampling_locations, attention_weights)],
            grad_output,
        )
    outputs = (grad_value, grad_sampling_loc, grad_attn_weight)
    for output, gradient in zip(outputs, found, strict=True):
        output.copy_(gradient)


# The Triton side. Triton itself is imported at the first launch, not before.


def _run(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    from . import deformable_attention_triton as kernels

    out = _run_fake(value, shapes, starts, locations, weights)
    tensors = (value, shapes, starts, locations, weights)
    kernels.forward(*(x.contiguous() for x in tensors), out=out)
    return out


def _run_fake(value, shapes, starts, locations, weights):
    batch, queries, heads = locations.shape[:3]
    return value.new_empty(batch, queries, heads * value.shape[-1])


def _run_backward(
    grad: Tensor, value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from . import deformable_attention_triton as kernels

    tensors = (grad, value, shapes, starts, locations, weights)
    found = _run_backward_fake(*tensors)
    kernels.backward(*(x.contiguous() for x in tensors), *found)
    return found


def _run_backward_fake(grad, value, shapes, starts, locations, weights):
    return tuple(x.new_empty(x.shape) for x in (value, locations, weights))


_attention = Operator(
    "deformable_attention",
    _run,
    schema="(Tensor value, Tensor shapes, Tensor starts, Tensor locations, Tensor weights) "
    "-> Tensor",
    fake=_run_fake,
)
_attention_backward = Operator(
    "deformable_attention_backward",
    _run_backward,
    schema="(Tensor grad, Tensor value, Tensor shapes, Tensor starts, Tensor locations, "
    "Tensor weights) -> (Tensor, Tensor, Tensor)",
    fake=_run_backward_fake,
)
