"""The landmarks' own Gaussian kernel, whose inverse SOFT takes."""

import torch
from torch import Tensor

from .backend import Operator, rows_contiguous, runs_triton, without_autocast
from .linear_attention import WIDEST_TRITON_HEAD


def gaussian_kernel(a: Tensor, b: Tensor) -> Tensor:
    """exp(-|a_i - b_j|^2 / 2) of the rows of `a` (..., N, D) and `b` (..., M, D).

    Computed and returned in float32, or in float64 if `a` is, whatever autocast says:
    (..., N, M). SOFT (arXiv:2110.11945), eq. 3.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    with without_autocast(a):
        a, b = a.to(wide), b.to(wide)
        lengths = a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :]
        return torch.exp(a @ b.mT - 0.5 * lengths)


def landmark_kernel(landmarks: Tensor) -> Tensor:
    """K_ij = exp(-|l_i - l_j|^2 / 2) of each head's landmarks: symmetric, with unit diagonal.

    Args:
        landmarks: (B, M, heads, D), float32, float64, float16 or bfloat16; any strides with the
            last axis contiguous. On CUDA, float64 and heads wider than 128 run the reference.

    Returns:
        (B, heads, M, M), float32 (or float64 of float64), whatever autocast says; on CUDA with
        float32's accuracy, whatever PyTorch's setting for TF32.

    Raises:
        ValueError: if the shape is another.
    """
    if landmarks.ndim != 4:
        raise ValueError(f"landmarks has shape {tuple(landmarks.shape)}, expected (B, M, heads, D)")
    if landmarks.shape[-1] > WIDEST_TRITON_HEAD or not runs_triton(landmarks):
        x = landmarks.transpose(1, 2)
        return gaussian_kernel(x, x)
    return _forward(landmarks)


# The Triton side. Triton itself is imported at the first launch, not before.


def _run(landmarks: Tensor) -> Tensor:
    from . import landmark_kernel_triton as kernels

    landmarks = rows_contiguous(landmarks)
    out = _run_fake(landmarks)
    kernels.forward(landmarks, out)
    return out


def _run_fake(landmarks):
    batch, marks, heads, _ = landmarks.shape
    return landmarks.new_empty(batch, heads, marks, marks, dtype=torch.float32)


def _run_backward(grad: Tensor, landmarks: Tensor) -> Tensor:
    from . import landmark_kernel_triton as kernels

    landmarks = rows_contiguous(landmarks)
    out = landmarks.new_empty(landmarks.shape)
    kernels.backward(grad.contiguous(), landmarks, out)
    return out


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):
    return _backward(grad, *ctx.saved_tensors)


_forward = Operator(
    "landmark_kernel(Tensor landmarks) -> Tensor",
    _run,
    _run_fake,
    _save,
    _differentiate,
)
_backward = Operator(
    "landmark_kernel_backward(Tensor grad, Tensor landmarks) -> Tensor",
    _run_backward,
    lambda grad, landmarks: landmarks.new_empty(landmarks.shape),
)
