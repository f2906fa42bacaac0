"""The registration of `polarity_attention`; Triton is imported at the first launch."""

import torch

from ..linear_attention.operator import count_flops as count_attention
from ..linear_attention.operator import state_shape
from ..runtime.dispatch import rows_contiguous
from ..runtime.operator import Operator
from ..runtime.program import cache_launches


def _plan_attention(query, local, gate):
    from ..linear_attention.plan import plan

    return plan(
        query.shape, query.dtype, query.device, "signed_power", "uniform", "polarized",
        size=None, local=local is not None, gate=gate is not None,
    )  # fmt: skip


@cache_launches
def _run(query, key, value, power, scale, local, gate):
    from ..linear_attention.forward import forward

    query, key, value, local, gate = map(rows_contiguous, (query, key, value, local, gate))
    how = _plan_attention(query, local, gate)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    # Powers and scales are the tables of this map, which is not rotated.
    return out, forward(how, query, key, value, power, scale, local, gate, out)


def _run_fake(query, key, value, power, scale, local, gate):
    batch, _, heads, width = query.shape
    state = state_shape(batch * heads, width, "signed_power")
    return query.new_empty(query.shape), query.new_empty(state, dtype=torch.float32)


@cache_launches
def _run_backward(grad, query, key, value, power, scale, local, gate, state):
    from ..linear_attention.backward import backward
    from .backward import differentiate_parameters

    grad, query, key, value, local, gate = map(
        rows_contiguous, (grad, query, key, value, local, gate)
    )
    how = _plan_attention(query, local, gate)
    dquery, dkey, dvalue, dpower, dscale, dlocal, dgate = outputs = _run_backward_fake(
        grad, query, key, value, power, scale, local, gate, state
    )
    key_parts, query_parts = (
        how.empty(query, *launch.grid, how.features)
        for launch in (how.key_gradient, how.query_gradient)
    )
    backward(
        how, grad, query, key, value, power, scale, local, gate, state, dquery, dkey, dvalue,
        None if local is None else dlocal, None if gate is None else dgate,
        parts_of_parameters=(key_parts, query_parts),
    )  # fmt: skip
    differentiate_parameters(key_parts, query_parts, power, scale, dpower, dscale)
    return outputs


def _run_backward_fake(grad, query, key, value, power, scale, local, gate, state):
    # An operator returns a fixed number of tensors: an empty one stands for None.
    return tuple(
        query.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in (query, key, value, power, scale, local, gate)
    )


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * 7
    saved = ctx.saved_tensors
    *gradients, dlocal, dgate = _backward(grad, *saved)
    local, gate = saved[5:7]
    return *gradients, None if local is None else dlocal, None if gate is None else dgate


def _count(query) -> int:
    batch, tokens, heads, width = query
    # The normalisers are two columns more of the reference's second product.
    return count_attention(query, "signed_power") + 8 * batch * heads * tokens * width


def _count_forward(query, *_, **__) -> int:
    return _count(query)


def _count_backward(grad, query, *_, **__) -> int:
    return 2 * _count(query)


polarity_attention = Operator(
    "polarity_attention",
    _run,
    _save,
    _differentiate,
    schema="(Tensor query, Tensor key, Tensor value, Tensor power, Tensor scale, Tensor? local, "
    "Tensor? gate) -> (Tensor, Tensor)",
    fake=_run_fake,
    flops=_count_forward,
)
_backward = Operator(
    "polarity_attention_backward",
    _run_backward,
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor power, Tensor scale, "
    "Tensor? local, Tensor? gate, Tensor state) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_run_backward_fake,
    flops=_count_backward,
)
