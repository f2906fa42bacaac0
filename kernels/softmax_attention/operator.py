"""The registration of `attention_of_parts`; Triton is imported at the first launch."""

from ..runtime.dispatch import rows_contiguous
from ..runtime.operator import Operator
from ..runtime.program import cache_launches


def _calls(parts):
    """Of each call of the kernels the channels, of queries and result, and which parts it takes."""
    whole, whole_local, _, _, second, _ = parts
    start = 0 if whole is None else whole_local.shape[-1]
    if whole is not None:
        yield slice(0, start), slice(0, 2)
    yield slice(start, None), slice(2, 4 if second is None else 6)


def _prepare(parts) -> list:
    return [None if x is None else x.contiguous() for x in parts]


@cache_launches
def _run(query, *parts):
    from .forward import forward

    out = _run_fake(query)
    query, parts = rows_contiguous(query), _prepare(parts)
    for channels, which in _calls(parts):
        forward(query[..., channels], parts[which], out[..., channels])
    return out


def _run_fake(query, *parts):
    return query.new_empty(query.shape)


@cache_launches
def _run_backward(grad, query, *parts):
    from .backward import backward

    dquery, *dparts = results = _run_backward_fake(grad, query, *parts)
    grad, query, parts = rows_contiguous(grad), rows_contiguous(query), _prepare(parts)
    for channels, which in _calls(parts):
        g, q, dq = (x[..., channels] for x in (grad, query, dquery))
        backward(g, q, dq, parts[which], dparts[which])
    return results


def _run_backward_fake(grad, query, *parts):
    # An operator returns no None: a part that is missing has an empty gradient.
    return (
        query.new_empty(query.shape),
        *(query.new_empty(0) if x is None else x.new_empty(x.shape) for x in parts),
    )


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):
    inputs = ctx.saved_tensors
    gradients = _backward(grad, *inputs)
    return tuple(None if x is None else dx for x, dx in zip(inputs, gradients, strict=True))


def _count_products(query, locals) -> int:
    """Operations of one product of all queries with their keys, by shapes (B, M, heads, D)."""
    batch, tokens, _ = query
    return sum(2 * batch * tokens * m * heads * d for _, m, heads, d in filter(None, locals))


def _count_forward(query, *parts, out_shape=None, **__) -> int:
    return 2 * _count_products(query, parts[1::2])


def _count_backward(grad, query, *parts, out_shape=None, **__) -> int:
    return 5 * _count_products(query, parts[1::2])


_PARTS = (
    "Tensor query, Tensor? whole, Tensor? whole_local, Tensor first, Tensor first_local, "
    "Tensor? second, Tensor? second_local"
)
attention_of_parts = Operator(
    "attention_of_parts",
    _run,
    _save,
    _differentiate,
    schema=f"({_PARTS}) -> Tensor",
    fake=_run_fake,
    flops=_count_forward,
)
_backward = Operator(
    "attention_of_parts_backward",
    _run_backward,
    schema=f"(Tensor grad, {_PARTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_run_backward_fake,
    flops=_count_backward,
)
