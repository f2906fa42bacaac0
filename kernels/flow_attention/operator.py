"""The registration of `flow_attention`; Triton is imported at the first launch."""

import torch

from ..runtime.operator import Operator
from ..runtime.program import cache_launches

# The fewest channels of a program: 64 bytes of a token in half precision.
LEAST_CHANNELS = 32


def padded_width(width: int) -> int:
    """The number of channels of a head that the kernels compute with."""
    return 1 << (int(width) - 1).bit_length()


def state_shape(batch: int, heads: int, width: int) -> tuple[int, int, int]:
    """The shape of the float32 state; see `plan.py`."""
    padded = padded_width(width)
    channels = max(LEAST_CHANNELS, padded)
    return batch * -(-heads // (channels // padded)), padded + 5, channels


@cache_launches
def _run(query, key, value):
    from .forward import forward

    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return out, forward(query, key, value, out)


def _run_fake(query, key, value):
    state = state_shape(query.shape[0], *query.shape[2:])
    return query.new_empty(query.shape), query.new_empty(state, dtype=torch.float32)


@cache_launches
def _run_backward(grad, query, key, value, state):
    from .backward import backward

    gradients = _run_backward_fake(grad, query, key, value, state)
    backward(grad, query, key, value, state, *gradients)
    return gradients


def _run_backward_fake(grad, query, key, value, state):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    return (None,) * 3 if grad is None else _backward(grad, *ctx.saved_tensors)


def _count_products(query) -> int:
    batch, tokens, heads, width = query
    # State and readout; and six flows, or sums of them, which are products with one column.
    return 4 * batch * heads * tokens * width * (width + 3)


def _count_forward(query, *_, **__) -> int:
    return _count_products(query)


def _count_backward(grad, query, *_, **__) -> int:
    return 2 * _count_products(query)


flow_attention = Operator(
    "flow_attention",
    _run,
    _save,
    _differentiate,
    schema="(Tensor query, Tensor key, Tensor value) -> (Tensor, Tensor)",
    fake=_run_fake,
    flops=_count_forward,
)
_backward = Operator(
    "flow_attention_backward",
    _run_backward,
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor state) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_run_backward_fake,
    flops=_count_backward,
)
