"""The registration of `gaussian_attention`; Triton is imported at the first launch."""

import torch

from ..runtime.dispatch import rows_contiguous
from ..runtime.operator import Operator
from ..runtime.program import cache_launches


@cache_launches
def _run(query, landmarks, value, inverse, local, scale):
    from .forward import forward

    query, landmarks, value, local = map(rows_contiguous, (query, landmarks, value, local))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    inverse = inverse.float().contiguous()
    return out, forward(query, landmarks, value, inverse, local, scale, out)


def _run_fake(query, landmarks, value, inverse, local, scale):
    batch, marks, heads, width = landmarks.shape
    padded = max(16, 1 << (int(width) - 1).bit_length())
    state = query.new_empty(2, batch * heads, marks, padded, dtype=torch.float32)
    return query.new_empty(query.shape), state


@cache_launches
def _run_backward(grad, query, landmarks, value, inverse, state, scale):
    from .backward import backward

    grad, query, landmarks, value = map(rows_contiguous, (grad, query, landmarks, value))
    results = _run_backward_fake(grad, query, landmarks, value, inverse, state, scale)
    inverse = inverse.float().contiguous()
    backward(grad, query, landmarks, value, inverse, state, scale, *results)
    return results


def _run_backward_fake(grad, query, landmarks, value, inverse, state, scale):
    dquery, dlandmarks, dvalue, dinverse = (
        x.new_empty(x.shape) for x in (query, landmarks, value, inverse)
    )
    return dquery, dlandmarks, dvalue, dinverse


def _save(ctx, inputs, output):
    *tensors, local, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.local_dtype = None if local is None else local.dtype
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    dlocal = None if ctx.local_dtype is None else grad.to(ctx.local_dtype)
    return *_backward(grad, *ctx.saved_tensors, ctx.scale), dlocal, None


def _count_products(query, landmarks) -> int:
    batch, tokens, heads, width = query
    marks = landmarks[1]
    return 2 * batch * heads * marks * width * (3 * tokens + marks)


def _count_forward(query, landmarks, *_, **__) -> int:
    return _count_products(query, landmarks)


def _count_backward(grad, query, landmarks, *_, **__) -> int:
    return 2 * _count_products(query, landmarks)


gaussian_attention = Operator(
    "gaussian_attention",
    _run,
    _save,
    _differentiate,
    schema="(Tensor query, Tensor landmarks, Tensor value, Tensor inverse, Tensor? local, "
    "float scale) -> (Tensor, Tensor)",
    fake=_run_fake,
    flops=_count_forward,
)
_backward = Operator(
    "gaussian_attention_backward",
    _run_backward,
    schema="(Tensor grad, Tensor query, Tensor landmarks, Tensor value, Tensor inverse, "
    "Tensor state, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_run_backward_fake,
    flops=_count_backward,
)
