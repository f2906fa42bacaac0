"""The registration of `window_attention`; Triton is imported at the first launch."""

import torch
from torch import Tensor

from ..runtime.dispatch import rows_contiguous
from ..runtime.operator import Operator
from ..runtime.program import cache_launches


def largest_tile(projection: Tensor, heads: int, table: Tensor | None) -> int:
    """The most tokens of a window that is one tile of a kernel: its scores stay in registers.

    A larger window is streamed, tile by tile, and leaves the logarithms of its softmax's sums
    for the backward pass.
    """
    wide = projection.shape[-1] > 3 * heads * 64
    if projection.dtype == torch.float32:
        return 32 if wide else 64
    return 128 if table is None and not wide else 64


def _prepare(projection, table, fill, weight, bias, heads, windows, shift, padding):
    """The tensors as the kernels take them, and the plan."""
    from .plan import plan

    table, fill, weight, bias = (
        None if x is None else x.contiguous() for x in (table, fill, weight, bias)
    )
    how = plan(
        projection.shape, projection.dtype, projection.device, heads,
        tuple(windows), tuple(shift), padding,
        None if table is None else tuple(table.shape[:2]), fill is not None,
        0 if weight is None else weight.shape[-1], bias is not None,
        largest_tile(projection, heads, table),
    )  # fmt: skip
    return how, rows_contiguous(projection), table, fill, weight, bias


@cache_launches
def _run(projection, table, fill, weight, bias, heads, windows, shift, padding):
    from .forward import forward

    out, sums = _run_fake(projection, table, fill, weight, bias, heads, windows, shift, padding)
    how, projection, table, fill, weight, bias = _prepare(
        projection, table, fill, weight, bias, heads, windows, shift, padding
    )
    forward(how, projection, table, fill, weight, bias, out, sums)
    return out, sums


def _run_fake(projection, table, fill, weight, bias, heads, windows, shift, padding):
    batch, height, width, channels = projection.shape
    sizes = list(zip(windows[::2], windows[1::2], strict=True))
    limit = largest_tile(projection, heads, table)
    size = 0
    for wh, ww in sizes:
        if wh * ww > limit:
            tokens = -(-height // wh) * -(-width // ww) * wh * ww
            size = size + batch * tokens * (heads // len(sizes))
    return (
        projection.new_empty(batch, height, width, channels // 3),
        projection.new_empty(size, dtype=torch.float32),
    )


@cache_launches
def _run_backward(
    grad, projection, table, fill, weight, bias, sums, heads, windows, shift, padding
):
    from .backward import backward

    how, projection, table, fill, weight, bias = _prepare(
        projection, table, fill, weight, bias, heads, windows, shift, padding
    )
    dprojection = torch.empty(projection.shape, dtype=projection.dtype, device=projection.device)
    grad = rows_contiguous(grad)
    gradients = backward(how, grad, projection, table, fill, weight, sums, dprojection)
    # An operator returns a fixed number of tensors: an empty one stands for None.
    return dprojection, *(
        projection.new_empty(0) if x is None or gradient is None else gradient.to(x.dtype)
        for x, gradient in zip((table, fill, weight, bias), gradients, strict=True)
    )


def _run_backward_fake(
    grad, projection, table, fill, weight, bias, sums, heads, windows, shift, padding
):
    return projection.new_empty(projection.shape), *(
        projection.new_empty(0) if x is None else x.new_empty(x.shape)
        for x in (table, fill, weight, bias)
    )


def _save(ctx, inputs, output):
    *tensors, ctx.heads, ctx.windows, ctx.shift, ctx.padding = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * 9
    saved = ctx.saved_tensors
    gradients = _backward(grad, *saved, ctx.heads, ctx.windows, ctx.shift, ctx.padding)
    present = (
        None if x is None else gradient for x, gradient in zip(saved[:5], gradients, strict=True)
    )
    return *present, None, None, None, None


def _count_products(projection, weight, windows) -> int:
    batch, height, width, packed = projection
    channels = packed // 3 // (len(windows) // 2)
    total = 0
    for wh, ww in zip(windows[::2], windows[1::2], strict=True):
        tokens = batch * -(-height // wh) * -(-width // ww) * wh * ww
        total += 4 * tokens * wh * ww * channels
        if weight is not None:
            total += 2 * tokens * channels * weight[2] * weight[3]
    return total


def _count_forward(projection, table, fill, weight, bias, heads, windows, *_, **__) -> int:
    return _count_products(projection, weight, windows)


def _count_backward(
    grad, projection, table, fill, weight, bias, sums, heads, windows, *_, **__
) -> int:
    return 2 * _count_products(projection, weight, windows)


window_attention = Operator(
    "window_attention",
    _run,
    _save,
    _differentiate,
    schema="(Tensor projection, Tensor? table, Tensor? fill, Tensor? weight, Tensor? bias, "
    "int heads, SymInt[] windows, SymInt[] shift, str padding) -> (Tensor, Tensor)",
    fake=_run_fake,
    flops=_count_forward,
)
_backward = Operator(
    "window_attention_backward",
    _run_backward,
    schema="(Tensor grad, Tensor projection, Tensor? table, Tensor? fill, Tensor? weight, "
    "Tensor? bias, Tensor sums, int heads, SymInt[] windows, SymInt[] shift, str padding) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_run_backward_fake,
    flops=_count_backward,
)
