"""The registration of `focused_linear_attention`; Triton is imported at the first launch."""

import torch

from ..linear_attention.operator import count_flops, state_shape
from ..runtime.dispatch import rows_contiguous
from ..runtime.operator import Operator
from ..runtime.program import cache_launches


def _make_features(query, key, scale, power):
    from .forward import forward

    # A head weak beside the others has cubes below the range of float16, and gradients of them
    # beyond it.
    dtype = torch.float32 if query.dtype == torch.float16 else query.dtype
    query_features, key_features = (
        torch.empty(x.shape, dtype=dtype, device=x.device) for x in (query, key)
    )
    forward(query, key, scale, power, query_features, key_features)
    return query_features, key_features


def _plan_attention(value, local):
    from ..linear_attention.plan import plan

    return plan(
        value.shape, value.dtype, value.device, "identity", "uniform", "normalized",
        size=None, local=local is not None, gate=False,
    )  # fmt: skip


@cache_launches
def _run(query, key, value, scale, local, power):
    from ..linear_attention.forward import forward

    value, local = rows_contiguous(value), rows_contiguous(local)
    features = _make_features(query, key, scale, power)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    how = _plan_attention(value, local)
    return out, forward(how, *features, value, None, None, local, None, out)


def _run_fake(query, key, value, scale, local, power):
    batch, _, heads, width = query.shape
    state = state_shape(batch * heads, width, "identity")
    return query.new_empty(query.shape), query.new_empty(state, dtype=torch.float32)


@cache_launches
def _run_backward(grad, query, key, value, scale, local, state, power):
    from ..linear_attention.backward import backward as attention_backward
    from .backward import backward

    grad, value, local = map(rows_contiguous, (grad, value, local))
    features = _make_features(query, key, scale, power)
    gradients = torch.empty_like(features[0]), torch.empty_like(features[1])
    dquery, dkey, dvalue, dscale, dlocal = outputs = _run_backward_fake(
        grad, query, key, value, scale, local, state, power
    )
    attention_backward(
        _plan_attention(value, local), grad, *features, value, None, None, local, None, state,
        *gradients, dvalue, None if local is None else dlocal, None,
    )  # fmt: skip
    backward(*gradients, query, key, scale, power, dquery, dkey, dscale)
    return outputs


def _run_backward_fake(grad, query, key, value, scale, local, state, power):
    # An operator returns a fixed number of tensors: an empty one stands for None.
    return tuple(
        query.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in (query, key, value, scale, local)
    )


def _save(ctx, inputs, output):
    *tensors, ctx.power = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    saved = ctx.saved_tensors
    *gradients, dlocal = _backward(grad, *saved, ctx.power)
    return *gradients, None if saved[4] is None else dlocal, None


def _count_forward(query, *_, **__) -> int:
    return count_flops(query, "identity")


def _count_backward(grad, query, *_, **__) -> int:
    return 2 * count_flops(query, "identity")


focused_linear_attention = Operator(
    "focused_linear_attention",
    _run,
    _save,
    _differentiate,
    schema="(Tensor query, Tensor key, Tensor value, Tensor scale, Tensor? local, int power) "
    "-> (Tensor, Tensor)",
    fake=_run_fake,
    flops=_count_forward,
)
_backward = Operator(
    "focused_linear_attention_backward",
    _run_backward,
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor scale, Tensor? local, "
    "Tensor state, int power) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_run_backward_fake,
    flops=_count_backward,
)
