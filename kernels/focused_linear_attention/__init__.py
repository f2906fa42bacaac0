"""Focused linear attention (FLatten Transformer): the linear attention of a focused power map.

The map sharpens the direction of a token and keeps its norm. Its norms go over all channels, and
so across the heads, of which a kernel of `linear_attention` sees one: the features are made by a
kernel in front of it, in a type that holds them, and computed again for the gradient.
"""

from torch import Tensor

from ..linear_attention import check_tensors
from ..runtime.dispatch import runs_triton, state_fits
from . import operator, reference

WIDEST_TRITON_TOKEN = 4096


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
            CUDA, float64, heads wider than 128 (64 on GPUs whose programs have 99 KiB of shared
            memory) and more than 4096 channels run the reference.
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
    fits = channels <= WIDEST_TRITON_TOKEN and state_fits(query.shape[3], query.device)
    if not (fits and runs_triton(query)):
        return reference.focused_linear_attention(query, key, value, scale, power, local)
    return operator.focused_linear_attention(query, key, value, scale, local, int(power))[0]
