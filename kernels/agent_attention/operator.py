"""The registration of `agent_attention`; Triton is imported at the first launch."""

import torch

from ..depthwise_conv2d.operator import count_flops as count_convolution
from ..runtime.dispatch import rows_contiguous
from ..runtime.operator import Operator
from ..runtime.program import cache_launches


@cache_launches
def _run(projection, bias, weight, weight_bias, heads, height, width, rows, columns):
    from .forward import forward
    from .plan import plan

    projection, weight_bias = rows_contiguous(projection), rows_contiguous(weight_bias)
    how = plan(
        projection.shape, projection.dtype, projection.device, heads, (height, width),
        (rows, columns), weight.shape[-1], weight_bias is not None,
    )  # fmt: skip
    out, agents, values, statistics = results = _run_fake(
        projection, bias, weight, weight_bias, heads, height, width, rows, columns
    )
    forward(
        how, projection, bias, weight.contiguous(), weight_bias, out, agents, values, statistics
    )
    return results


def _run_fake(projection, bias, weight, weight_bias, heads, height, width, rows, columns):
    batch, tokens, packed = projection.shape
    shape = (batch * heads, rows * columns, packed // (3 * heads))
    return (
        projection.new_empty(batch, tokens, packed // 3),
        projection.new_empty(shape),
        projection.new_empty(shape, dtype=torch.float32),
        projection.new_empty(batch * heads, 2, rows * columns, dtype=torch.float32),
    )


@cache_launches
def _run_backward(
    grad, projection, bias, weight, agents, values, statistics, heads, height, width, rows, columns
):
    from ..depthwise_conv2d.weight_gradient import weight_gradient
    from .backward import backward
    from .plan import plan

    grad, projection = rows_contiguous(grad), rows_contiguous(projection)
    how = plan(
        projection.shape, projection.dtype, projection.device, heads, (height, width),
        (rows, columns), weight.shape[-1], False,
    )  # fmt: skip
    total = torch.empty(projection.shape, dtype=projection.dtype, device=projection.device)
    dbias = backward(
        how, projection, bias, grad, weight.contiguous(), agents, values, statistics, total
    )
    channels = grad.shape[2]
    size, prefix = (height, width), grad.shape[1] - height * width
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    dweight_bias = torch.empty(channels, dtype=weight.dtype, device=weight.device)
    weight_gradient(
        grad[:, prefix:].unflatten(1, size),
        projection[:, prefix:, 2 * channels :].unflatten(1, size),
        1,
        None,
        dweight,
        dweight_bias,
    )
    return total, dbias.to(bias.dtype), dweight, dweight_bias


def _run_backward_fake(
    grad, projection, bias, weight, agents, values, statistics, heads, height, width, rows, columns
):
    return (
        projection.new_empty(projection.shape),
        bias.new_empty(bias.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[0]),
    )


def _save(ctx, inputs, output):
    projection, bias, weight, weight_bias, *ctx.sizes = inputs
    _, *state = output
    ctx.save_for_backward(projection, bias, weight, *state)
    ctx.bias_dtype = None if weight_bias is None else weight_bias.dtype
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    dprojection, dbias, dweight, dweight_bias = _backward(grad, *ctx.saved_tensors, *ctx.sizes)
    dweight_bias = None if ctx.bias_dtype is None else dweight_bias.to(ctx.bias_dtype)
    return dprojection, dbias, dweight, dweight_bias, None, None, None, None, None


def _count_products(projection, weight, size, grid) -> tuple[int, int]:
    """The products of the pooling, and all others."""
    batch, tokens, packed = projection
    channels, agents = packed // 3, grid[0] * grid[1]
    pooling = 2 * batch * grid[1] * channels * size[0] * (size[1] + grid[0])
    local = count_convolution((batch, *size, channels), weight)
    return pooling, 8 * batch * agents * tokens * channels + local


def _count_forward(
    projection, bias, weight, weight_bias, heads, height, width, rows, columns, *_, **__
) -> int:
    return sum(_count_products(projection, weight, (height, width), (rows, columns)))


def _count_backward(
    grad, projection, bias, weight, agents, values, statistics, heads, height, width, rows,
    columns, *_, **__,
) -> int:  # fmt: skip
    # The matrices that pool are constant.
    pooling, rest = _count_products(projection, weight, (height, width), (rows, columns))
    return pooling + 2 * rest


_SIZES = "int heads, SymInt height, SymInt width, int rows, int columns"
agent_attention = Operator(
    "agent_attention",
    _run,
    _save,
    _differentiate,
    schema="(Tensor projection, Tensor bias, Tensor weight, Tensor? weight_bias, "
    f"{_SIZES}) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_run_fake,
    flops=_count_forward,
)
_backward = Operator(
    "agent_attention_backward",
    _run_backward,
    schema="(Tensor grad, Tensor projection, Tensor bias, Tensor weight, Tensor agents, "
    f"Tensor values, Tensor statistics, {_SIZES}) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_run_backward_fake,
    flops=_count_backward,
)
