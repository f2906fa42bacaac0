"""Convolutions that sample where they are told: deformable (v1 and v2) and masked.

The offsets of a deformable convolution are (B, 2 G k_h k_w, h, w), y before x for each point of
the kernel, G the groups of channels that move together; its mask is (B, G k_h k_w, h, w).
Scratch tensors that mmcv passes for its own use (columns, ones) are left alone.
"""

import torch
import torch.nn.functional as F
import torchvision  # noqa: F401  registers torch.ops.torchvision
from torch import Tensor

from ..runtime.dispatch import without_autocast


def _computable(*tensors: Tensor) -> list[Tensor]:
    """The tensors in a dtype that torchvision's kernels take: it has none for bfloat16."""
    wide = tensors[0].dtype == torch.bfloat16
    return [x.float() if wide else x for x in tensors]


def _store(sources: tuple[Tensor, ...], outputs: tuple[Tensor | None, ...]) -> None:
    for source, output in zip(sources, outputs, strict=True):
        if output is not None:
            output.copy_(source)


def _on_edge(offset: Tensor, kernel: torch.Size, geometry: tuple[int, ...]) -> Tensor:
    """Whether a point lies in row or column -1 exactly: (B, G, k_h, k_w, 1, h, w)."""
    stride, padding, dilation = (geometry[i : i + 2] for i in (0, 2, 4))
    shifts = offset.view(len(offset), geometry[-1], *kernel, 2, *offset.shape[-2:])
    y, x = (
        torch.arange(size, device=offset.device) * stride[axis]
        - padding[axis]
        + torch.arange(points, device=offset.device)[:, None] * dilation[axis]
        for axis, (size, points) in enumerate(zip(offset.shape[-2:], kernel, strict=True))
    )
    y = y[:, None, None, :, None] + shifts[..., :1, :, :]
    x = x[:, None, None, :] + shifts[..., 1:, :, :]
    return (y == -1) | (x == -1)


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Deformable convolution (Dai et al., 2017) of `input` (B, C, H, W) into `output`."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    none = input.new_empty(0)
    modulated_deform_conv_forward(
        input, weight, none, ones, offset, none, output, columns, kH, kW, *geometry, False
    )


def _deform_conv_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    geometry: tuple[int, ...],
) -> tuple[Tensor, ...]:
    """Gradients in the input, the weight, the offset, the mask and a bias."""
    bias = weight.new_zeros(weight.shape[0])
    use_mask = mask is not None
    if mask is None:
        mask = offset.new_zeros(len(input), 0)
    tensors = _computable(grad_output, input, weight, offset, mask, bias)
    with without_autocast(input):
        found = torch.ops.torchvision._deform_conv2d_backward(*tensors, *geometry, use_mask)
    # Where new offsets are zero, points of the padding lie at -1 exactly, where the bilinear
    # sample has a kink: mmcv takes its derivative from outside, torchvision from inside.
    edge = _on_edge(offset, weight.shape[2:], geometry)
    grad_offset = found[2].view(*edge.shape[:4], 2, *edge.shape[5:])
    return *found[:2], grad_offset.masked_fill(edge, 0).view_as(offset), *found[3:]


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """The gradients of `deform_conv_forward` in its input and its offset."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    found = _deform_conv_backward(grad_output, input, weight, offset, None, geometry)
    _store(found, (grad_input, None, grad_offset, None, None))


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """`scale` times the gradient of `deform_conv_forward` in its weight."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    found = _deform_conv_backward(grad_output, input, grad_weight, offset, None, geometry)
    grad_weight.copy_(scale * found[1])


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Modulated deformable convolution (Zhu et al., 2019) of `input` into `output`.

    An empty `mask` modulates nothing.
    """
    use_mask = mask.numel() > 0
    if not use_mask:
        mask = offset.new_zeros(len(input), 0)
    if not with_bias:
        bias = weight.new_zeros(weight.shape[0])
    tensors = _computable(input, weight, offset, mask, bias)
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
    with without_autocast(input):
        result = torch.ops.torchvision.deform_conv2d(
            *tensors, *geometry, group, deformable_group, use_mask
        )
    output.copy_(result)


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """The gradients of `modulated_deform_conv_forward` in all five of its tensors."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    found = _deform_conv_backward(grad_output, input, weight, offset, mask, geometry)
    bias_output = grad_bias if with_bias else None
    _store(found, (grad_input, grad_weight, grad_offset, grad_mask, bias_output))


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """The patches of `im` (1, C, H, W) at M outputs' rows and columns, into (C k_h k_w, M)."""
    rows = mask_h_idx + torch.arange(kernel_h, device=im.device)[:, None, None]
    columns = mask_w_idx + torch.arange(kernel_w, device=im.device)[:, None]
    padded = F.pad(im[0], (pad_w, pad_w, pad_h, pad_h))
    col.copy_(padded[:, rows, columns].flatten(0, 2))


def masked_col2im_forward(
    col: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    im: Tensor,
    height: int,
    width: int,
    channels: int,
) -> None:
    """Put the M columns of `col` (C, M) at their rows and columns of `im` (1, C, H, W)."""
    im[0, :, mask_h_idx, mask_w_idx] = col.to(im.dtype)
