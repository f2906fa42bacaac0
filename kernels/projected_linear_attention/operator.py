"""The registration of `projected_linear_attention`; Triton is imported at the first launch."""

import torch

from ..depthwise_conv2d.operator import count_flops as count_convolution
from ..depthwise_conv2d.operator import empty_gradients
from ..linear_attention.operator import count_flops as count_attention
from ..linear_attention.operator import map_size, state_shape
from ..runtime.dispatch import rows_contiguous
from ..runtime.operator import Operator
from ..runtime.program import cache_launches
from .reference import unpack


def _plan_attention(query, rows, columns, feature_map, key_weights, readout, add):
    from ..linear_attention.plan import plan

    return plan(
        query.shape, query.dtype, query.device, feature_map, key_weights, readout,
        size=map_size(rows, columns), local=True, gate=True, add=add,
    )  # fmt: skip


@cache_launches
def _run(projection, weight, bias, rows, columns, heads, feature_map, key_weights, readout):
    from ..depthwise_conv2d.convolution import forward as convolve
    from ..linear_attention.forward import forward as attend

    projection, bias = rows_contiguous(projection), rows_contiguous(bias)
    query, key, value, gate = unpack(projection, heads)
    out, _ = _run_fake(
        projection, weight, bias, rows, columns, heads, feature_map, key_weights, readout
    )
    local = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    value_map = projection.chunk(4, -1)[2]
    convolve(value_map, weight.contiguous(), bias, 1, None, False, local)
    how = _plan_attention(query, rows, columns, feature_map, key_weights, readout, add=False)
    state = attend(
        how, query, key, value, rows, columns, unpack(local, heads, 1)[0], gate,
        unpack(out, heads, 1)[0],
    )  # fmt: skip
    return out, state


def _run_fake(projection, weight, bias, rows, columns, heads, feature_map, key_weights, readout):
    batch, height, width, channels = projection.shape
    shape = (batch, height, width, channels // 4)
    state = state_shape(batch * heads, channels // (4 * heads), feature_map)
    return projection.new_empty(shape), projection.new_empty(state, dtype=torch.float32)


@cache_launches
def _run_backward(
    grad, projection, weight, bias, state, rows, columns, heads, feature_map, key_weights, readout
):
    from ..depthwise_conv2d.convolution import forward as convolve
    from ..depthwise_conv2d.convolution import input_gradient
    from ..depthwise_conv2d.weight_gradient import weight_gradient
    from ..linear_attention.backward import backward as attend_backward

    grad, projection = rows_contiguous(grad), rows_contiguous(projection)
    weight, bias = weight.contiguous(), rows_contiguous(bias)
    total, dweight, dbias = empty_gradients(projection, weight)
    local, dlocal = (
        torch.empty(grad.shape, dtype=projection.dtype, device=projection.device) for _ in range(2)
    )
    query, key, value, gate = unpack(projection, heads)
    dquery, dkey, dvalue, dgate = unpack(total, heads)
    value_map, dvalue_map = projection.chunk(4, -1)[2], total.chunk(4, -1)[2]
    # The gate's gradient wants the local branch: computed again, it is a map less to keep.
    convolve(value_map, weight, bias, 1, None, False, local)

    def differentiate_local() -> None:
        input_gradient(dlocal, value_map, weight, 1, None, False, dvalue_map)

    how = _plan_attention(query, rows, columns, feature_map, key_weights, readout, add=True)
    attend_backward(
        how, unpack(grad, heads, 1)[0], query, key, value, rows, columns,
        unpack(local, heads, 1)[0], gate, state, dquery, dkey, dvalue,
        unpack(dlocal, heads, 1)[0], dgate,
        between=differentiate_local,
    )  # fmt: skip
    weight_gradient(dlocal, value_map, 1, None, dweight, dbias)
    return total, dweight, dbias


def _run_backward_fake(
    grad, projection, weight, bias, state, rows, columns, heads, feature_map, key_weights, readout
):
    return empty_gradients(projection, weight)


def _save(ctx, inputs, output):
    projection, weight, bias, rows, columns, *ctx.options = inputs
    ctx.save_for_backward(projection, weight, bias, output[1], rows, columns)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    dprojection, dweight, dbias = _backward(grad, *ctx.saved_tensors, *ctx.options)
    dbias = None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)
    return dprojection, dweight, dbias, None, None, None, None, None, None


def _count_products(projection, weight, heads: int, feature_map: str) -> int:
    batch, height, width, channels = projection
    query = (batch, height * width, heads, channels // (4 * heads))
    local = count_convolution((batch, height, width, channels // 4), weight)
    return count_attention(query, feature_map) + local


def _count_forward(projection, weight, bias, rows, columns, heads, feature_map, *_, **__) -> int:
    return _count_products(projection, weight, heads, feature_map)


def _count_backward(
    grad, projection, weight, bias, state, rows, columns, heads, feature_map, *_, **__
) -> int:
    return 2 * _count_products(projection, weight, heads, feature_map)


projected_linear_attention = Operator(
    "projected_linear_attention",
    _run,
    _save,
    _differentiate,
    schema="(Tensor projection, Tensor weight, Tensor? bias, Tensor? rows, Tensor? columns, "
    "int heads, str feature_map, str key_weights, str readout) -> (Tensor, Tensor)",
    fake=_run_fake,
    flops=_count_forward,
)
_backward = Operator(
    "projected_linear_attention_backward",
    _run_backward,
    schema="(Tensor grad, Tensor projection, Tensor weight, Tensor? bias, Tensor state, "
    "Tensor? rows, Tensor? columns, int heads, str feature_map, str key_weights, "
    "str readout) -> (Tensor, Tensor, Tensor)",
    fake=_run_backward_fake,
    flops=_count_backward,
)
