"""CARAFE (Wang et al., 2019): upsampling with a kernel of its own for each new pixel.

With scale s, kernel k and G groups of channels, `features` are (B, C, H, W) and `masks`
(B, G k², s H, s W): out(y, x) = sum over i, j of mask(i, j; y, x) features(y/s + i, x/s + j),
zero outside. mmcv's scratch tensors are left alone.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import accumulator


def _split_groups(x: Tensor, groups: int, scale: int) -> Tensor:
    """(B, G n, s H, s W) as (B, G, n, H, s, W, s)."""
    batch, channels, height, width = x.shape
    shape = (batch, groups, channels // groups, height // scale, scale, width // scale, scale)
    return x.reshape(shape)


def _shifts(kernel_size: int) -> Iterator[tuple[int, int, int]]:
    """The kernel's points: index, row and column."""
    for point in range(kernel_size**2):
        yield point, *divmod(point, kernel_size)


def _forward(features: Tensor, masks: Tensor, kernel: int, groups: int, scale: int) -> Tensor:
    dtype = accumulator(features)
    height, width = features.shape[2:]
    masks = _split_groups(masks, groups, scale).to(dtype)
    padded = F.pad(features.to(dtype), [kernel // 2] * 4)
    out = padded.new_zeros(())
    for point, i, j in _shifts(kernel):
        shifted = _split_groups(padded[:, :, i : i + height, j : j + width], groups, 1)
        out = out + shifted * masks[:, :, point, None]
    return out.flatten(1, 2).flatten(2, 3).flatten(3, 4)


def _backward(
    grad: Tensor, features: Tensor, masks: Tensor, kernel: int, groups: int, scale: int
) -> tuple[Tensor, Tensor]:
    dtype = accumulator(features)
    height, width = features.shape[2:]
    grad = _split_groups(grad.to(dtype), groups, scale)
    masks = _split_groups(masks, groups, scale).to(dtype)
    padded = F.pad(features.to(dtype), [kernel // 2] * 4)
    grad_padded, grad_masks = torch.zeros_like(padded), torch.empty_like(masks)
    for point, i, j in _shifts(kernel):
        window = (slice(None), slice(None), slice(i, i + height), slice(j, j + width))
        shifted = _split_groups(padded[window], groups, 1)
        grad_masks[:, :, point] = (grad * shifted).sum(2)
        grad_padded[window] += (grad * masks[:, :, point, None]).sum((4, 6)).flatten(1, 2)
    border = kernel // 2
    inner = grad_padded[:, :, border : border + height, border : border + width]
    return inner, grad_masks.flatten(1, 2).flatten(2, 3).flatten(3, 4)


def carafe_naive_forward(
    features: Tensor,
    masks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Upsample `features` into `output` (B, C, s H, s W)."""
    output.copy_(_forward(features, masks, kernel_size, group_size, scale_factor))


def carafe_naive_backward(
    top_grad: Tensor,
    features: Tensor,
    masks: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """The gradients in the features and in the masks."""
    found = _backward(top_grad, features, masks, kernel_size, group_size, scale_factor)
    bottom_grad.copy_(found[0])
    mask_grad.copy_(found[1])


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Upsample `features` into `output`; `rfeatures` keeps them for the backward."""
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(
    top_grad: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rtop_grad: Tensor,
    rbottom_grad_hs: Tensor,
    rbottom_grad: Tensor,
    rmask_grad: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """The gradients in the features, as `carafe_forward` kept them, and in the masks."""
    carafe_naive_backward(
        top_grad,
        rfeatures,
        masks,
        bottom_grad,
        mask_grad,
        kernel_size,
        group_size,
        scale_factor,
    )
