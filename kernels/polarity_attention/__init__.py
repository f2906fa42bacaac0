"""Polarity-aware linear attention (PolaFormer): queries and keys by the signs of their channels.

Its feature map is each channel's own, so that the kernels of `linear_attention` make the features
in registers, as those of its other maps.
"""

from torch import Tensor

from ..linear_attention import check_tensors
from ..runtime.dispatch import WIDEST_SMALL_HEAD, runs_triton
from . import operator, reference


def polarity_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    power: Tensor,
    scale: Tensor,
    *,
    local: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Linear attention whose values are summed, half and half, over keys of either sign.

    With x+ = relu(x / s)^p and x- = relu(-x / s)^p of a query or key x, in each head the first half
    of the channels is the linear attention of the queries f = [q+, q-] and the keys g = [k+, k-],
    the second half that of the queries f = [q-, q+] and the same keys (arXiv:2501.15061, eqs. 5
    to 7), each normalised by itself:

        y_i = f_i sum_j g_j^T v_j / N / (f_i . sum_j g_j / N + 1e-6)
        out = (y + local) * gate

    Args:
        query, key, value: (B, N, heads, D), D even, float32, float64, float16 or bfloat16. Any
            strides with the last axis contiguous, so that a packed projection is read in place.
            On CUDA, float64 and heads wider than 64 run the reference.
        power: p, (heads, D), 1 or more, any floating dtype.
        scale: s, (heads, D), positive, any floating dtype.
        local: (B, N, heads, D) added to the result.
        gate: (B, N, heads, D) multiplied with the sum.

    Returns:
        (B, N, heads, D) contiguous, in the dtype of `query`; sums are in float32 or wider.

    Raises:
        ValueError: if shapes disagree, or a head has an odd number of channels.
    """
    check_tensors(query, key, value, local, gate)
    heads, width = query.shape[2:]
    if width % 2:
        raise ValueError(
            f"query has heads of {width} channels, expected an even number: one half is for keys "
            "of either sign"
        )
    for name, x in (("power", power), ("scale", scale)):
        if x.shape != (heads, width):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, expected ({heads}, {width}), one for each "
                "channel of each head"
            )
    # Features and state are twice as wide as the head.
    if not (width <= WIDEST_SMALL_HEAD and runs_triton(query)):
        return reference.polarity_attention(query, key, value, power, scale, local, gate)
    return operator.polarity_attention(query, key, value, power, scale, local, gate)[0]
