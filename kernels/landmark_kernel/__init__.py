"""The landmarks' own Gaussian kernel, whose inverse SOFT takes."""

from torch import Tensor

from ..runtime.dispatch import WIDEST_HEAD, runs_triton
from . import operator, reference


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
    if landmarks.shape[-1] > WIDEST_HEAD or not runs_triton(landmarks):
        return reference.landmark_kernel(landmarks)
    return operator.landmark_kernel(landmarks)
