"""The focused power map of queries and keys (FLatten Transformer, arXiv:2308.00442).

It sharpens the direction of a token, and keeps its norm. As the norms go over all channels, and
so across the heads, it stands in front of `linear_attention` and not inside it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Operator, runs_triton, without_autocast

EPSILON = 1e-6
WIDEST_TRITON_ROW = 4096


def reference(x: Tensor, scale: Tensor, power: int) -> Tensor:
    """The map of queries or of keys; see `focused_features`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x):
        t = (x.to(wide).relu() + EPSILON) / F.softplus(scale.to(wide))
        # The norm of powers would leave the range of float32: of powers of quotients it cannot.
        largest = t.detach().amax(-1, keepdim=True)
        powers = (t / largest) ** power
        norm, norm_of_powers = (
            torch.linalg.vector_norm(y, dim=-1, keepdim=True) for y in (t, powers)
        )
        return (norm / norm_of_powers * powers).to(x.dtype)


def focused_features(
    query: Tensor, key: Tensor, scale: Tensor, *, power: int = 3
) -> tuple[Tensor, Tensor]:
    """The focused power map, f(t) = ||t|| t^p / ||t^p|| with t = (relu(x) + 1e-6) / softplus(s).

    Powers are elementwise, norms are over all channels (FLatten Transformer, arXiv:2308.00442,
    eq. 5, with the authors' learned divisor). Split into heads, its results are the query and the
    key of `linear_attention` with ``feature_map="identity"`` and ``readout="normalized"``.

    Args:
        query: (..., C), all heads of a token beside each other, float32, float64, float16 or
            bfloat16. A slice of a packed projection is read in place.
        key: (..., C) of the dtype of `query`; other axes are its own.
        scale: s, (C,), any floating dtype.
        power: p, 1 or more.

    Returns:
        The features of query and key, contiguous, in the dtype of `query`; computed in float32 or
        wider. A token without a positive channel has features of about 1e-6 / softplus(s).

    Raises:
        ValueError: if shapes or dtypes disagree, or `power` is less than 1.
    """
    channels = query.shape[-1]
    if key.shape[-1] != channels or key.dtype != query.dtype:
        raise ValueError(
            f"key is {key.dtype} with {key.shape[-1]} channels, expected {query.dtype} with "
            f"{channels} as query has"
        )
    if scale.shape != (channels,):
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}, expected ({channels},), the channels of query"
        )
    if power < 1 or power != int(power):
        raise ValueError(f"power is {power}, expected an integer of 1 or more")
    if channels > WIDEST_TRITON_ROW or not runs_triton(query):
        return reference(query, scale, power), reference(key, scale, power)
    return _forward(query, key, scale, int(power))


# The Triton side. Triton itself is imported at the first launch, not before.


def _run(query, key, scale, power):
    from . import focused_features_triton as kernels

    outputs = _run_fake(query, key, scale, power)
    kernels.forward(query, key, scale, power, *outputs)
    return outputs


def _run_fake(query, key, scale, power):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key))


def _run_backward(grad_query, grad_key, query, key, scale, power):
    from . import focused_features_triton as kernels

    outputs = _run_backward_fake(grad_query, grad_key, query, key, scale, power)
    kernels.backward(grad_query, grad_key, query, key, scale, power, *outputs)
    return outputs


def _run_backward_fake(grad_query, grad_key, query, key, scale, power):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, scale))


def _save(ctx, inputs, output):
    *tensors, ctx.power = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad_query, grad_key):
    return *_backward(grad_query, grad_key, *ctx.saved_tensors, ctx.power), None


_forward = Operator(
    "focused_features(Tensor query, Tensor key, Tensor scale, int power) -> (Tensor, Tensor)",
    _run,
    _run_fake,
    _save,
    _differentiate,
)
_backward = Operator(
    "focused_features_backward(Tensor grad_query, Tensor grad_key, Tensor query, Tensor key, "
    "Tensor scale, int power) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _run_backward_fake,
)
