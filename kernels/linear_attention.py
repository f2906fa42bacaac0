"""The linear-attention family as one template: feature map, key weights, state, readout.

Every member computes, per head, with feature map phi, key weights w and rotation R,

    S = sum_j w_j R(phi(k_j))^T v_j / N        the state, D x D (2 D x D if norm-aware)
    n_i = phi(q_i) . sum_j w_j phi(k_j) / N    the normaliser, without rotation
    y_i = readout(R(phi(q_i)) S, n_i)
    out = (y + local) * gate                   the epilogue

so its cost is linear in the number of tokens N.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from .backend import Operator, rows_contiguous, runs_triton, without_autocast
from .rotary import Rotary, apply_rotary, check_rotary

FeatureMap = Literal["elu_plus_one", "relu", "exp", "identity", "norm_aware"]
KeyWeights = Literal["uniform", "global_query"]
Readout = Literal["normalized", "magnitude_aware", "subtractive"]

EPSILON = 1e-6
WIDEST_TRITON_HEAD = 128


def elementwise(x: Tensor, feature_map: FeatureMap) -> Tensor:
    """phi(x) of an elementwise map. elu(x) + 1 is written so that it never rounds to zero."""
    if feature_map == "elu_plus_one":
        # Not clamp, whose gradient at zero is 0 in some versions of PyTorch: phi's is 1.
        return torch.where(x > 0, x + 1, x.masked_fill(x > 0, 0).exp())
    if feature_map == "relu":
        return x.relu()
    if feature_map == "exp":
        return x.exp()
    return x


def norm_aware_query(query: Tensor) -> Tensor:
    """NaLaFormer's phi(q): the direction's positive and negative part, to a power of the norm."""
    norm = torch.linalg.vector_norm(query, dim=-1, keepdim=True)
    direction = query.abs() / norm.masked_fill(norm == 0, 1)
    return halves(query.sign() * direction ** (3 * (0.5 + norm.tanh())))


def halves(x: Tensor) -> Tensor:
    """(..., D) to (..., 2 D): the positive parts, then the negative parts."""
    return torch.cat((x.relu(), (-x).relu()), -1)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    key_weights: KeyWeights,
    readout: Readout,
    rotary: Rotary | None,
    local: Tensor | None,
    gate: Tensor | None,
) -> Tensor:
    """The equations above as a reader of the papers would write them; see `linear_attention`."""
    dtype = query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    with without_autocast(query):
        q, k, v = query.to(wide), key.to(wide), value.to(wide)
        if feature_map == "norm_aware":
            q, k = norm_aware_query(q), halves(k**3)
        else:
            q, k = elementwise(q, feature_map), elementwise(k, feature_map)
        width = value.shape[-1]
        scale = width**-0.5
        if key_weights == "global_query":
            # RALA, eq. 5: N times the softmax over tokens of the mean query against the keys.
            scores = scale * (q.mean(1, keepdim=True) * k).sum(-1, keepdim=True)
            k = k * (scores.softmax(1) * k.shape[1])
        normalizer = (q * k.mean(1, keepdim=True)).sum(-1, keepdim=True)
        if rotary is not None:
            # Each half of norm-aware features is turned as a head of its own.
            q, k = (
                apply_rotary(x.unflatten(-1, (-1, width)).flatten(2, 3), rotary).view_as(x)
                for x in (q, k)
            )
        # Batched matrix products over heads; dividing before the sum keeps half precision safe.
        state = (k / k.shape[1]).permute(0, 2, 3, 1) @ v.permute(0, 2, 1, 3)
        y = (q.permute(0, 2, 1, 3) @ state).permute(0, 2, 1, 3)
        if readout == "normalized":
            y = y / (normalizer + EPSILON)
        elif readout == "magnitude_aware":
            # MALA, eq. 8: beta = 1 + 1 / z multiplies, z times the mean value is subtracted.
            z = scale * normalizer
            y = scale * y * (1 + 1 / (z + EPSILON)) - z * v.mean(1, keepdim=True)
        else:
            # InLine, eq. 7: the weights of a query sum to one by subtraction.
            y = scale * y - (scale * normalizer - 1) * v.mean(1, keepdim=True)
        if local is not None:
            y = y + local.to(wide)
        if gate is not None:
            y = y * gate.to(wide)
    return y.to(dtype)


def feature_width(width: int, feature_map: str) -> int:
    """Channels of phi(x) for a head of `width`."""
    return 2 * width if feature_map == "norm_aware" else width


def check_options(
    tokens: int, rotary: Rotary | None, feature_map: str, key_weights: str, readout: str
) -> None:
    """Raise ValueError unless the options are known and the tables fit the tokens."""
    for name, got, kind in (
        ("feature_map", feature_map, FeatureMap),
        ("key_weights", key_weights, KeyWeights),
        ("readout", readout, Readout),
    ):
        if got not in get_args(kind):
            raise ValueError(f"{name} is {got!r}, expected one of {', '.join(get_args(kind))}")
    if rotary is not None:
        check_rotary(rotary, "query", tokens)


def check_tensors(
    query: Tensor, key: Tensor, value: Tensor, local: Tensor | None, gate: Tensor | None
) -> None:
    """Raise ValueError unless all are (B, N, heads, D), of one shape."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (B, N, heads, D)")
    if key.shape != query.shape or value.shape != query.shape:
        raise ValueError(
            "query, key and value must have one shape, got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    for name, x in (("local", local), ("gate", gate)):
        if x is not None and x.shape != query.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(query.shape)}")


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: FeatureMap = "elu_plus_one",
    key_weights: KeyWeights = "uniform",
    readout: Readout = "normalized",
    rotary: Rotary | None = None,
    local: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Linear attention over all tokens of an image, at a cost linear in their number.

    Args:
        query, key, value: (B, N, heads, D), float32, float64, float16 or bfloat16. Any strides
            with the last axis contiguous, so that a packed projection is read in place. On
            CUDA, float64 and heads wider than 128 run the reference.
        feature_map: phi. Elementwise 'elu_plus_one', 'relu', 'exp', or 'identity'; or
            'norm_aware' (NaLaFormer, arXiv:2506.21137): with n = ||q||,
            phi(q) = sign(q) (|q| / n)^p, p = 3 (0.5 + tanh n), and phi(k) = k^3, both split into
            their positive and negative part, features of 2 D channels, of which each half is
            turned as a head. A head of q that is all zeros, where q / n is undefined, has
            features and a gradient of zero. FLatten's focused power map, whose norms go across
            the heads, is that of `focused_linear_attention`.
        key_weights: 'uniform' (w = 1) or 'global_query', RALA's N * softmax over tokens of
            D^-0.5 mean_i(phi(q_i)) . phi(k_j) (arXiv:2411.07635, eq. 5).
        readout: with n the normaliser and s = D^-0.5,
            'normalized': R(phi(q)) S / (n + 1e-6);
            'magnitude_aware': s R(phi(q)) S (1 + 1 / (s n + 1e-6)) - s n mean(v) (MALA,
            arXiv:2507.00698, eq. 8);
            'subtractive': s R(phi(q)) S + (1 - s n) mean(v) (InLine, arXiv:2412.06590, eq. 7).
        rotary: tables of `rotary_tables` for a map with H * W = N and heads of D; turns phi(q)
            and phi(k) in the numerator only.
        local: (B, N, heads, D) added to the result.
        gate: (B, N, heads, D) multiplied with the sum.

    Returns:
        (B, N, heads, D) contiguous, in the dtype of `query`; sums are in float32 or wider.

    Raises:
        ValueError: if shapes disagree or an option is unknown.
    """
    check_tensors(query, key, value, local, gate)
    check_options(query.shape[1], rotary, feature_map, key_weights, readout)
    if query.shape[-1] > WIDEST_TRITON_HEAD or not runs_triton(query):
        return reference(query, key, value, feature_map, key_weights, readout, rotary, local, gate)
    rows, columns = (None, None) if rotary is None else rotary
    return _forward(
        query, key, value, rows, columns, local, gate, feature_map, key_weights, readout
    )[0]


# The Triton side. Triton itself is imported at the first launch, not before.


def padded_width(width: int) -> int:
    """The channels of a head, as many as the kernels compute with."""
    return max(16, 1 << (int(width) - 1).bit_length())


def state_shape(rows: int, width: int, feature_map: str) -> tuple[int, int, int]:
    """Of the float32 state of `rows` heads, as linear_attention_triton lays it out."""
    padded = padded_width(width)
    halves = feature_width(1, feature_map)
    return rows, halves * (padded + 2) + 2, padded


def _run(query, key, value, rows, columns, local, gate, feature_map, key_weights, readout):
    from . import linear_attention_triton as kernels

    query, key, value, local, gate = map(rows_contiguous, (query, key, value, local, gate))
    rotary = None if rows is None else (rows, columns)
    problem = kernels.Problem(query, rotary, feature_map, key_weights, readout)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return out, kernels.forward(problem, query, key, value, local, gate, out)


def _run_fake(query, key, value, rows, columns, local, gate, feature_map, key_weights, readout):
    batch, _, heads, width = query.shape
    state = state_shape(batch * heads, width, feature_map)
    return query.new_empty(query.shape), query.new_empty(state, dtype=torch.float32)


def _run_backward(
    grad, query, key, value, rows, columns, local, gate, state, feature_map, key_weights, readout
):
    from . import linear_attention_triton as kernels

    grad, query, key, value, local, gate = map(
        rows_contiguous, (grad, query, key, value, local, gate)
    )
    rotary = None if rows is None else (rows, columns)
    problem = kernels.Problem(query, rotary, feature_map, key_weights, readout)
    dquery, dkey, dvalue, dlocal, dgate = _run_backward_fake(
        grad, query, key, value, rows, columns, local, gate, state, "", "", ""
    )
    kernels.backward(
        problem,
        grad,
        query,
        key,
        value,
        local,
        gate,
        state,
        dquery,
        dkey,
        dvalue,
        None if local is None else dlocal,
        None if gate is None else dgate,
    )
    return dquery, dkey, dvalue, dlocal, dgate


def _run_backward_fake(
    grad, query, key, value, rows, columns, local, gate, state, feature_map, key_weights, readout
):
    # An operator returns a fixed number of tensors: an empty one stands for none.
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
    dquery, dkey, dvalue, dlocal, dgate = _backward(
        grad, *ctx.saved_tensors, ctx.feature_map, ctx.key_weights, ctx.readout
    )
    local, gate = ctx.saved_tensors[5:7]
    dlocal = None if local is None else dlocal
    dgate = None if gate is None else dgate
    return dquery, dkey, dvalue, None, None, dlocal, dgate, None, None, None


_forward = Operator(
    "linear_attention(Tensor query, Tensor key, Tensor value, Tensor? rows, Tensor? columns, "
    "Tensor? local, Tensor? gate, str feature_map, str key_weights, str readout) "
    "-> (Tensor, Tensor)",
    _run,
    _run_fake,
    _save,
    _differentiate,
)
_backward = Operator(
    "linear_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, "
    "Tensor? rows, Tensor? columns, Tensor? local, Tensor? gate, Tensor state, "
    "str feature_map, str key_weights, str readout) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _run_backward_fake,
)
