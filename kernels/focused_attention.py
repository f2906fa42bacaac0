"""Focused linear attention (FLatten Transformer): the linear attention of a focused power map.

The map sharpens the direction of a token and keeps its norm. Its norms go over all channels, and
so across the heads, of which a kernel of `linear_attention` sees one: the features are made by a
kernel in front of it, in a type that holds them, and never kept for the gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import linear_attention as attention
from .backend import Operator, rows_contiguous, runs_triton, without_autocast
from .linear_attention import WIDEST_TRITON_HEAD, check_tensors, state_shape

EPSILON = 1e-6
WIDEST_TRITON_TOKEN = 4096


def focused_power(x: Tensor, scale: Tensor, power: int) -> Tensor:
    """The feature map of x (B, N, heads, D); see `focused_linear_attention`."""
    t = (x.relu() + EPSILON) / F.softplus(scale).unflatten(0, x.shape[2:])
    # The norm of t^p may leave the range of float32; that of (t / max t)^p cannot.
    largest = t.detach().amax((-2, -1), keepdim=True)
    t = t / largest
    norms = [torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True) for y in (t, t**power)]
    return largest * norms[0] / norms[1] * t**power


def reference(
    query: Tensor, key: Tensor, value: Tensor, scale: Tensor, power: int, local: Tensor | None
) -> Tensor:
    """Feature map and attention, composed; see `focused_linear_attention`."""
    wide = torch.promote_types(query.dtype, torch.float32)
    with without_autocast(query):
        q, k = (focused_power(x.to(wide), scale.to(wide), power) for x in (query, key))
        y = attention.reference(q, k, value, "identity", "uniform", "normalized", None, local, None)
    return y.to(query.dtype)


def focused_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor,
    *,
    power: int = 3,
    local: Tensor | None = None,
) -> Tensor:
    """`linear_attention` of the focused power map phi (FLatten, arXiv:2308.00442).

    With t = (relu(x) + 1e-6) / softplus(s) of a query or key x, all its heads together,

        phi(x) = ||t|| t^p / ||t^p||
        S = sum_j phi(k_j)^T v_j / N
        y_i = phi(q_i) S / (phi(q_i) . sum_j phi(k_j) / N + 1e-6) + local

    where powers are elementwise, norms go over all heads * D channels, and the rest is each
    head's own.

    Args:
        query, key, value: (B, N, heads, D), float32, float64, float16 or bfloat16. Any strides
            with the last axis contiguous, so that a packed projection is read in place. On
            CUDA, float64, heads wider than 128 and more than 4096 channels run the reference.
        scale: s, the authors' learned divisor, (heads * D,), any floating dtype.
        power: p, an integer of 1 or more.
        local: (B, N, heads, D) added to the result.

    Returns:
        (B, N, heads, D) contiguous, in the dtype of `query`; sums are in float32 or wider.

    Raises:
        ValueError: if shapes or the dtypes of query and key disagree, or for another power.
    """
    check_tensors(query, key, value, local, None)
    if key.dtype != query.dtype:
        raise ValueError(f"key is {key.dtype}, expected {query.dtype} as query is")
    channels = query.shape[2] * query.shape[3]
    if scale.shape != (channels,):
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}, expected ({channels},), one for each channel "
            "of each head"
        )
    if power < 1 or power != int(power):
        raise ValueError(f"power is {power}, expected an integer of 1 or more")
    if (
        query.shape[3] > WIDEST_TRITON_HEAD
        or channels > WIDEST_TRITON_TOKEN
        or not runs_triton(query)
    ):
        return reference(query, key, value, scale, power, local)
    return _forward(query, key, value, scale, local, int(power))[0]


# The Triton side. Triton itself is imported at the first launch, not before.


def _features(query, key, scale, power):
    """Features of query and key. A head weak beside the others has cubes below the range of
    float16, and gradients of them beyond it."""
    from . import focused_attention_triton as kernels

    dtype = torch.float32 if query.dtype == torch.float16 else query.dtype
    features = [torch.empty(x.shape, dtype=dtype, device=x.device) for x in (query, key)]
    kernels.forward(query, key, scale, power, *features)
    return features


def _problem(value):
    from . import linear_attention_triton as kernels

    return kernels, kernels.Problem(value, None, "identity", "uniform", "normalized")


def _run(query, key, value, scale, local, power):
    value, local = rows_contiguous(value), rows_contiguous(local)
    kernels, problem = _problem(value)
    features = _features(query, key, scale, power)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return out, kernels.forward(problem, *features, value, local, None, out)


def _run_fake(query, key, value, scale, local, power):
    batch, _, heads, width = query.shape
    state = state_shape(batch * heads, width, "identity")
    return query.new_empty(query.shape), query.new_empty(state, dtype=torch.float32)


def _run_backward(grad, query, key, value, scale, local, state, power):
    from .focused_attention_triton import backward

    grad, value, local = map(rows_contiguous, (grad, value, local))
    kernels, problem = _problem(value)
    features = _features(query, key, scale, power)
    gradients = [torch.empty_like(x) for x in features]
    dquery, dkey, dvalue, dscale, dlocal = outputs = _run_backward_fake(
        grad, query, key, value, scale, local, state, power
    )
    kernels.backward(
        problem,
        grad,
        *features,
        value,
        local,
        None,
        state,
        *gradients,
        dvalue,
        None if local is None else dlocal,
        None,
    )
    backward(*gradients, query, key, scale, power, dquery, dkey, dscale)
    return outputs


def _run_backward_fake(grad, query, key, value, scale, local, state, power):
    # An operator returns a fixed number of tensors: an empty one stands for none.
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
    *gradients, dlocal = _backward(grad, *ctx.saved_tensors, ctx.power)
    return *gradients, None if ctx.saved_tensors[4] is None else dlocal, None


_forward = Operator(
    "focused_linear_attention(Tensor query, Tensor key, Tensor value, Tensor scale, "
    "Tensor? local, int power) -> (Tensor, Tensor)",
    _run,
    _run_fake,
    _save,
    _differentiate,
)
_backward = Operator(
    "focused_linear_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, "
    "Tensor scale, Tensor? local, Tensor state, int power) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _run_backward_fake,
)
