"""The registration of `linear_attention`; Triton is imported at the first launch."""

import torch
from torch import Tensor

from ..runtime.dispatch import rows_contiguous
from ..runtime.operator import Operator
from ..runtime.program import cache_launches


def feature_width(width: int, feature_map: str) -> int:
    """Channels of phi(x) for a head of `width`."""
    return 2 * width if feature_map in ("norm_aware", "signed_power") else width


def padded_width(width: int) -> int:
    """The number of channels of a head that the kernels compute with."""
    return max(16, 1 << (int(width) - 1).bit_length())


def state_shape(rows: int, width: int, feature_map: str) -> tuple[int, int, int]:
    """The shape of the float32 state of `rows` heads; see `plan.py`."""
    padded = padded_width(width)
    halves = feature_width(1, feature_map)
    return rows, halves * (padded + 2) + 2, padded


def map_size(rows: Tensor | None, columns: Tensor | None) -> tuple[int, int] | None:
    """The height and width of the map that rotary tables are for; None without tables."""
    return None if rows is None or columns is None else (rows.shape[1], columns.shape[1])


@cache_launches
def _run(query, key, value, rows, columns, local, gate, feature_map, key_weights, readout):
    from .forward import forward
    from .plan import plan

    query, key, value, local, gate = map(rows_contiguous, (query, key, value, local, gate))
    how = plan(
        query.shape, query.dtype, query.device, feature_map, key_weights, readout,
        size=map_size(rows, columns), local=local is not None, gate=gate is not None,
    )  # fmt: skip
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return out, forward(how, query, key, value, rows, columns, local, gate, out)


def _run_fake(query, key, value, rows, columns, local, gate, feature_map, key_weights, readout):
    batch, _, heads, width = query.shape
    state = state_shape(batch * heads, width, feature_map)
    return query.new_empty(query.shape), query.new_empty(state, dtype=torch.float32)


@cache_launches
def _run_backward(
    grad, query, key, value, rows, columns, local, gate, state, feature_map, key_weights, readout
):
    from .backward import backward
    from .plan import plan

    grad, query, key, value, local, gate = map(
        rows_contiguous, (grad, query, key, value, local, gate)
    )
    how = plan(
        query.shape, query.dtype, query.device, feature_map, key_weights, readout,
        size=map_size(rows, columns), local=local is not None, gate=gate is not None,
    )  # fmt: skip
    gradients = _run_backward_fake(
        grad, query, key, value, rows, columns, local, gate, state, "", "", ""
    )
    dquery, dkey, dvalue, dlocal, dgate = gradients
    dlocal = None if local is None else dlocal
    dgate = None if gate is None else dgate
    backward(
        how, grad, query, key, value, rows, columns, local, gate, state,
        dquery, dkey, dvalue, dlocal, dgate,
    )  # fmt: skip
    return gradients


def _run_backward_fake(
    grad, query, key, value, rows, columns, local, gate, state, feature_map, key_weights, readout
):
    # An operator returns a fixed number of tensors: an empty one stands for None.
    return tuple(
        query.new_empty(0) if x is None else x.new_empty(x.shape)
        for x in (query, key, value, local, gate)
    )


def _save(ctx, inputs, output):
    *tensors, ctx.feature_map, ctx.key_weights, ctx.readout = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * 10
    saved = ctx.saved_tensors
    dquery, dkey, dvalue, dlocal, dgate = _backward(
        grad, *saved, ctx.feature_map, ctx.key_weights, ctx.readout
    )
    local, gate = saved[5:7]
    dlocal = None if local is None else dlocal
    dgate = None if gate is None else dgate
    return dquery, dkey, dvalue, None, None, dlocal, dgate, None, None, None


def count_flops(query, feature_map: str) -> int:
    """The products of state and readout, from the shape of the queries."""
    batch, tokens, heads, width = query
    return 4 * batch * heads * tokens * feature_width(width, feature_map) * width


def _count_forward(query, key, value, rows, columns, local, gate, feature_map, *_, **__) -> int:
    return count_flops(query, feature_map)


def _count_backward(
    grad, query, key, value, rows, columns, local, gate, state, feature_map, *_, **__
) -> int:
    return 2 * count_flops(query, feature_map)


linear_attention = Operator(
    "linear_attention",
    _run,
    _save,
    _differentiate,
    schema="(Tensor query, Tensor key, Tensor value, Tensor? rows, Tensor? columns, "
    "Tensor? local, Tensor? gate, str feature_map, str key_weights, str readout) "
    "-> (Tensor, Tensor)",
    fake=_run_fake,
    flops=_count_forward,
)
_backward = Operator(
    "linear_attention_backward",
    _run_backward,
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? rows, "
    "Tensor? columns, Tensor? local, Tensor? gate, Tensor state, str feature_map, "
    "str key_weights, str readout) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_run_backward_fake,
    flops=_count_backward,
)
