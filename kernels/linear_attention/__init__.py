"""The linear-attention family as one template: feature map, key weights, state, readout.

Every member computes, per head, with feature map phi, key weights w and rotation R,

    S = sum_j w_j R(phi(k_j))^T v_j / N        the state, D x D (2 D x D if norm-aware)
    n_i = phi(q_i) . sum_j w_j phi(k_j) / N    the normaliser, without rotation
    y_i = readout(R(phi(q_i)) S, n_i)
    out = (y + local) * gate                   the epilogue

so its cost is linear in the number of tokens N.
"""

from typing import Literal, get_args

from torch import Tensor

from ..rotary import Rotary, check_rotary
from ..runtime.dispatch import runs_triton, state_fits
from . import operator, reference

FeatureMap = Literal["elu_plus_one", "relu", "exp", "identity", "norm_aware"]
KeyWeights = Literal["uniform", "global_query"]
Readout = Literal["normalized", "summed", "floored", "magnitude_aware", "subtractive"]
_FEATURE_MAPS, _KEY_WEIGHTS, _READOUTS = map(get_args, (FeatureMap, KeyWeights, Readout))


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
            CUDA, float64 and heads wider than 128 (64 on GPUs whose programs have 99 KiB of shared
            memory, and with norm-aware features 163) run the reference.
        feature_map: phi. Elementwise 'elu_plus_one', 'relu', 'exp', or 'identity'; or
            'norm_aware' (NaLaFormer, arXiv:2506.21137): with n = ||q||,
            phi(q) = sign(q) (|q| / n)^p, p = 3 (0.5 + tanh n), and phi(k) = k^3, both split into
            their positive and negative part, features of 2 D channels, of which each half is
            turned as a head. A head of q that is all zeros, where q / n is undefined, has
            features and a gradient of zero. FLatten's focused power map, whose norms go across
            the heads, is in `focused_linear_attention`.
        key_weights: 'uniform' (w = 1) or 'global_query', RALA's N * softmax over tokens of
            D^-0.5 mean_i(phi(q_i)) . phi(k_j) (arXiv:2411.07635, eq. 5).
        readout: with n the normaliser and s = D^-0.5,
            'normalized': R(phi(q)) S / (n + 1e-6);
            'summed': R(phi(q)) S / (n + 1e-6 / N), whose 1e-6 is added to the sum over keys N n
            (SLAB, arXiv:2405.11582);
            'floored': R(phi(q)) S / max(n, 100 / N), whose floor is absolute for the sum over keys
            N n (L2ViT, arXiv:2501.16182);
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
    fits = state_fits(query.shape[-1], query.device, feature_map == "norm_aware")
    if not (fits and runs_triton(query)):
        return reference.linear_attention(
            query, key, value, feature_map, key_weights, readout, rotary, local, gate
        )
    rows, columns = (None, None) if rotary is None else rotary
    return operator.linear_attention(
        query, key, value, rows, columns, local, gate, feature_map, key_weights, readout
    )[0]


def check_options(
    tokens: int, rotary: Rotary | None, feature_map: str, key_weights: str, readout: str
) -> None:
    """Raise ValueError unless the options are known and the tables fit the tokens."""
    for name, got, known in (
        ("feature_map", feature_map, _FEATURE_MAPS),
        ("key_weights", key_weights, _KEY_WEIGHTS),
        ("readout", readout, _READOUTS),
    ):
        if got not in known:
            raise ValueError(f"{name} is {got!r}, expected one of {', '.join(known)}")
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
