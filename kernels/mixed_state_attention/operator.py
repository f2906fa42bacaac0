"""The registration of `mixed_state_attention`; Triton is imported at the first launch."""

import torch

from ..linear_attention.operator import padded_width
from ..runtime.dispatch import rows_contiguous
from ..runtime.operator import Operator
from ..runtime.program import cache_launches


def padded_head(width: int) -> int:
    """The channels of a head with its padding, 32 at least.

    With 16, two runs of the query gradient as Triton 3.6 compiles it for Hopper differ.
    """
    return max(32, padded_width(width))


@cache_launches
def _run(query, key, value, mixing, local, height, width, by_states):
    from . import forward, states
    from .plan import plan, plan_states

    query, key, value, local = map(rows_contiguous, (query, key, value, local))
    signature = query.shape, query.dtype, (height, width), len(mixing), local is not None
    results = _run_fake(query, key, value, mixing, local, height, width, by_states)
    out, sums, state, inverse = results
    tensors = query, key, value, mixing.contiguous(), local, sums
    if by_states:
        states.forward(plan_states(*signature), *tensors, state, inverse, out)
    else:
        forward.forward(plan(*signature), *tensors, out)
    return results


def _run_fake(query, key, value, mixing, local, height, width, by_states):
    batch, tokens, heads, head_width = query.shape
    rows, padded = batch * heads, padded_head(head_width)
    # An operator returns a fixed number of tensors: an empty one stands for None.
    state, inverse = ((padded, padded), tokens) if by_states else ((0, 0), 0)
    return (
        query.new_empty(query.shape),
        query.new_empty(rows, len(mixing), padded, dtype=torch.float32),
        query.new_empty(rows, len(mixing), *state, dtype=torch.float32),
        query.new_empty(rows, inverse, dtype=torch.float32),
    )


@cache_launches
def _run_backward(grad, query, key, value, mixing, sums, state, inverse, height, width, by_states):
    from . import backward, states
    from .plan import plan, plan_states

    grad, query, key, value = map(rows_contiguous, (grad, query, key, value))
    signature = query.shape, query.dtype, (height, width), len(mixing), False
    gradients = [x.new_empty(x.shape) for x in (query, key, value)]
    tensors = grad, query, key, value, mixing.contiguous(), sums
    if by_states:
        how = plan_states(*signature)
        dmixing = states.backward(how, *tensors, state, inverse, *gradients)
    else:
        dmixing = backward.backward(plan(*signature), *tensors, *gradients)
    return *gradients, dmixing.to(mixing.dtype).contiguous()


def _run_backward_fake(
    grad, query, key, value, mixing, sums, state, inverse, height, width, by_states
):
    return tuple(x.new_empty(x.shape) for x in (query, key, value, mixing))


def _save(ctx, inputs, output):
    query, key, value, mixing, local, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, mixing, *output[1:])
    ctx.local_dtype = None if local is None else local.dtype
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    gradients = _backward(grad, *ctx.saved_tensors, *ctx.options)
    dlocal = None if ctx.local_dtype is None else grad.to(ctx.local_dtype)
    return *gradients, dlocal, None, None, None


def _count_forward(query, key, value, mixing, local, height, width, *_, **__) -> int:
    batch, _, heads, head_width = query
    side = round(mixing[0] ** 0.5)
    tokens = -(-height // side) * -(-width // side) * mixing[0]
    # States and readout; the mixing of the states, and that of the normalisers.
    products = 2 * tokens * head_width**2 + mixing[0] ** 2 * head_width**2 + mixing[0] * tokens
    return 2 * batch * heads * products


def _count_backward(
    grad, query, key, value, mixing, sums, state, inverse, height, width, *_, **__
) -> int:
    return 2 * _count_forward(query, key, value, mixing, None, height, width)


mixed_state_attention = Operator(
    "mixed_state_attention",
    _run,
    _save,
    _differentiate,
    schema="(Tensor query, Tensor key, Tensor value, Tensor mixing, Tensor? local, "
    "SymInt height, SymInt width, bool by_states) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_run_fake,
    flops=_count_forward,
)
_backward = Operator(
    "mixed_state_attention_backward",
    _run_backward,
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor mixing, Tensor sums, "
    "Tensor state, Tensor inverse, SymInt height, SymInt width, bool by_states) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_run_backward_fake,
    flops=_count_backward,
)
