"""The registration of `hash_attention`; Triton is imported at the first launch."""

import torch

from ..linear_attention.operator import padded_width
from ..runtime.dispatch import rows_contiguous
from ..runtime.operator import Operator
from ..runtime.program import cache_launches


@cache_launches
def _run(query, value, anchors, means, hyperplanes):
    from .forward import forward

    query, value = rows_contiguous(query), rows_contiguous(value)
    anchors, means, hyperplanes = (t.float().contiguous() for t in (anchors, means, hyperplanes))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return out, *forward(query, value, anchors, means, hyperplanes, out)


def _run_fake(query, value, anchors, means, hyperplanes):
    batch, tokens, heads, width = query.shape
    rows, bits = batch * heads, padded_width(hyperplanes.shape[1])
    return (
        query.new_empty(query.shape),
        query.new_empty((rows, tokens, bits), dtype=torch.int8),
        query.new_empty((rows, bits, padded_width(width) + 1), dtype=torch.float32),
        query.new_empty(rows, dtype=torch.float32),
    )


@cache_launches
def _run_backward(grad, query, value, anchors, means, hyperplanes, codes, state, distance):
    from .backward import backward

    grad, query, value = map(rows_contiguous, (grad, query, value))
    anchors, hyperplanes = (t.float().contiguous() for t in (anchors, hyperplanes))
    dquery, dvalue = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, value))
    backward(grad, query, value, anchors, hyperplanes, codes, state, distance, dquery, dvalue)
    return dquery, dvalue


def _run_backward_fake(grad, query, value, anchors, means, hyperplanes, codes, state, distance):
    return query.new_empty(query.shape), value.new_empty(value.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 5
    return *_backward(grad, *ctx.saved_tensors), None, None, None


def _count_forward(query, value, anchors, means, hyperplanes, *_, **__) -> int:
    batch, tokens, heads, width = query
    number, bits = anchors[1], hyperplanes[1]
    return 2 * batch * tokens * heads * (width * number + number * bits + 2 * bits * width)


def _count_backward(grad, query, value, anchors, means, hyperplanes, *_, **__) -> int:
    batch, tokens, heads, width = query
    number, bits = anchors[1], hyperplanes[1]
    return 2 * batch * tokens * heads * (width * number + number * bits + 4 * bits * width)


hash_attention = Operator(
    "hash_attention",
    _run,
    _save,
    _differentiate,
    schema="(Tensor query, Tensor value, Tensor anchors, Tensor means, Tensor hyperplanes) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_run_fake,
    flops=_count_forward,
)
_backward = Operator(
    "hash_attention_backward",
    _run_backward,
    schema="(Tensor grad, Tensor query, Tensor value, Tensor anchors, Tensor means, "
    "Tensor hyperplanes, Tensor codes, Tensor state, Tensor distance) -> (Tensor, Tensor)",
    fake=_run_backward_fake,
    flops=_count_backward,
)
