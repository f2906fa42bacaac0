"""Gated linear attention of a packed projection, with its local branch: one gradient tensor.

RALA's and MALA's mixers are linear_attention(q, k, v, local=conv(v), gate=gate) of one
projection that packs q, k, v and the gate. Composed of the two operators, autograd would
assemble the projection's gradient through copies and sums of its own, as many bytes again as
the operators move; here every kernel writes its slice of it.
"""

import torch
from torch import Tensor

from .backend import Operator, rows_contiguous, runs_triton
from .depthwise_conv import TRITON_KERNELS, depthwise_conv2d, empty_gradients
from .linear_attention import (
    WIDEST_TRITON_HEAD,
    FeatureMap,
    KeyWeights,
    Readout,
    check_options,
    linear_attention,
    state_shape,
)
from .rotary import Rotary


def reference(
    projection: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    heads: int,
    feature_map: FeatureMap,
    key_weights: KeyWeights,
    readout: Readout,
    rotary: Rotary | None,
) -> Tensor:
    """The two operators, composed; see `projected_linear_attention`."""
    batch, height, width, channels = projection.shape
    query, key, value, gate = _unpacked(projection, heads)
    local = depthwise_conv2d(projection.chunk(4, -1)[2], weight, bias)
    return linear_attention(
        query,
        key,
        value,
        feature_map=feature_map,
        key_weights=key_weights,
        readout=readout,
        rotary=rotary,
        local=local.reshape(value.shape),
        gate=gate,
    ).reshape(batch, height, width, channels // 4)


def projected_linear_attention(
    projection: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    heads: int,
    feature_map: FeatureMap = "elu_plus_one",
    key_weights: KeyWeights = "uniform",
    readout: Readout = "normalized",
    rotary: Rotary | None = None,
) -> Tensor:
    """(attention(q, k, v) + conv(v)) * gate, of a projection that packs q, k, v and the gate.

    It is `linear_attention` with `local` the depthwise convolution of v, and `gate` the last
    quarter: the core of the RALA (arXiv:2411.07635) and MALA (arXiv:2507.00698) mixers between
    their two projections.

    Args:
        projection: (B, H, W, 4 C), the channel blocks q, k, v, gate in this order, each of
            `heads` heads; any strides with the last axis contiguous.
        weight, bias: of the local branch, as in `depthwise_conv2d`: (C, 1, k, k) and (C,).
        heads: number of heads; C is a multiple of it.
        feature_map, key_weights, readout, rotary: as in `linear_attention`, for H * W tokens.

    Returns:
        (B, H, W, C) contiguous, in the dtype of `projection`; sums are in float32 or wider.

    Raises:
        ValueError: if shapes disagree or an option is unknown.
    """
    check_projection(projection, weight, heads)
    head_dim = projection.shape[-1] // (4 * heads)
    if (
        head_dim > WIDEST_TRITON_HEAD
        or weight.shape[-1] not in TRITON_KERNELS
        or not runs_triton(projection)
    ):
        return reference(projection, weight, bias, heads, feature_map, key_weights, readout, rotary)
    check_options(
        projection.shape[1] * projection.shape[2], rotary, feature_map, key_weights, readout
    )
    rows, columns = (None, None) if rotary is None else rotary
    return _forward(
        projection, weight, bias, rows, columns, heads, feature_map, key_weights, readout
    )[0]


def check_projection(projection: Tensor, weight: Tensor, heads: int) -> None:
    """Raise ValueError unless both are as `projected_linear_attention` says."""
    if projection.ndim != 4 or projection.shape[-1] % (4 * heads):
        raise ValueError(
            f"projection has shape {tuple(projection.shape)}, expected (B, H, W, 4 C) with C a "
            f"multiple of heads = {heads}"
        )
    channels = projection.shape[-1] // 4
    if weight.shape != (channels, 1, weight.shape[-1], weight.shape[-1]):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected ({channels}, 1, k, k) with odd k"
        )


def _unpacked(x: Tensor, heads: int, blocks: int = 4) -> tuple[Tensor, ...]:
    """The blocks of a packed map as views (B, N, heads, D)."""
    return x.flatten(1, 2).unflatten(-1, (blocks, heads, -1)).unbind(2)


# The Triton side. Triton itself is imported at the first launch, not before.


def _run(projection, weight, bias, rows, columns, heads, feature_map, key_weights, readout):
    from . import depthwise_conv_triton as convolution
    from . import linear_attention_triton as attention

    projection = rows_contiguous(projection)
    query, key, value, gate = _unpacked(projection, heads)
    out, _ = _run_fake(
        projection, weight, bias, rows, columns, heads, feature_map, key_weights, readout
    )
    local = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    value_map = projection.chunk(4, -1)[2]
    convolution.forward(value_map, weight.contiguous(), bias, 1, False, False, local)
    rotary = None if rows is None else (rows, columns)
    problem = attention.Problem(query, rotary, feature_map, key_weights, readout)
    state = attention.forward(
        problem, query, key, value, *(_unpacked(local, heads, 1)), gate, *_unpacked(out, heads, 1)
    )
    return out, state


def _run_fake(projection, weight, bias, rows, columns, heads, feature_map, key_weights, readout):
    batch, height, width, channels = projection.shape
    shape = (batch, height, width, channels // 4)
    state = state_shape(batch * heads, channels // (4 * heads), feature_map)
    return projection.new_empty(shape), projection.new_empty(state, dtype=torch.float32)


def _run_backward(
    grad, projection, weight, bias, state, rows, columns, heads, feature_map, key_weights, readout
):
    from . import depthwise_conv_triton as convolution
    from . import linear_attention_triton as attention

    grad, projection = rows_contiguous(grad), rows_contiguous(projection)
    total, dweight, dbias = empty_gradients(projection, weight)
    local, dlocal = (
        torch.empty(grad.shape, dtype=projection.dtype, device=projection.device) for _ in range(2)
    )
    query, key, value, gate = _unpacked(projection, heads)
    dquery, dkey, dvalue, dgate = _unpacked(total, heads)
    value_map, dvalue_map = projection.chunk(4, -1)[2], total.chunk(4, -1)[2]
    # The gate's gradient wants the local branch: computed again, it is a map less to keep.
    convolution.forward(value_map, weight.contiguous(), bias, 1, False, False, local)

    def convolve() -> None:
        convolution.input_gradient(
            dlocal, value_map, weight.contiguous(), 1, False, False, dvalue_map
        )

    rotary = None if rows is None else (rows, columns)
    problem = attention.Problem(query, rotary, feature_map, key_weights, readout)
    attention.backward(
        problem,
        *_unpacked(grad, heads, 1),
        query,
        key,
        value,
        *_unpacked(local, heads, 1),
        gate,
        state,
        dquery,
        dkey,
        dvalue,
        *_unpacked(dlocal, heads, 1),
        dgate,
        between=convolve,
    )
    convolution.weight_gradient(dlocal, value_map, 1, False, dweight, dbias)
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


_forward = Operator(
    "projected_linear_attention(Tensor projection, Tensor weight, Tensor? bias, Tensor? rows, "
    "Tensor? columns, int heads, str feature_map, str key_weights, str readout) "
    "-> (Tensor, Tensor)",
    _run,
    _run_fake,
    _save,
    _differentiate,
)
_backward = Operator(
    "projected_linear_attention_backward(Tensor grad, Tensor projection, Tensor weight, "
    "Tensor? bias, Tensor state, Tensor? rows, Tensor? columns, int heads, str feature_map, "
    "str key_weights, str readout) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _run_backward_fake,
)
