"""The registration of `landmark_kernel`; Triton is imported at the first launch."""

import torch
from torch import Tensor

from ..runtime.dispatch import rows_contiguous
from ..runtime.operator import Operator
from ..runtime.program import cache_launches


@cache_launches
def _run(landmarks: Tensor) -> Tensor:
    from .forward import forward

    landmarks = rows_contiguous(landmarks)
    out = _run_fake(landmarks)
    forward(landmarks, out)
    return out


def _run_fake(landmarks):
    batch, marks, heads, _ = landmarks.shape
    return landmarks.new_empty(batch, heads, marks, marks, dtype=torch.float32)


@cache_launches
def _run_backward(grad: Tensor, landmarks: Tensor) -> Tensor:
    from .backward import backward

    landmarks = rows_contiguous(landmarks)
    out = landmarks.new_empty(landmarks.shape)
    backward(grad.contiguous(), landmarks, out)
    return out


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):
    return _backward(grad, *ctx.saved_tensors)


def _count_products(landmarks) -> int:
    batch, marks, heads, width = landmarks
    return 2 * batch * heads * marks * marks * width


def _count_forward(landmarks, *_, **__) -> int:
    return _count_products(landmarks)


def _count_backward(grad, landmarks, *_, **__) -> int:
    return 2 * _count_products(landmarks)


landmark_kernel = Operator(
    "landmark_kernel",
    _run,
    _save,
    _differentiate,
    schema="(Tensor landmarks) -> Tensor",
    fake=_run_fake,
    flops=_count_forward,
)
_backward = Operator(
    "landmark_kernel_backward",
    _run_backward,
    schema="(Tensor grad, Tensor landmarks) -> Tensor",
    fake=lambda grad, landmarks: landmarks.new_empty(landmarks.shape),
    flops=_count_backward,
)
