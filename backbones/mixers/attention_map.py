"""Softmax attention whose attention map a module sees, where timm's fused attention is off."""

from timm.layers import use_fused_attn
from torch import Tensor, nn

from ...kernels.softmax_attention import softmax_attention


def make_attention_drop() -> nn.Dropout | None:
    """The module `attn_drop` of a softmax mixer, which gets its attention map, or None.

    Fused attention never has the map in memory. As timm's models do, those that are built after
    ``timm.layers.set_fused_attn(False)`` compute it, so that hooks on `attn_drop` see it, timm's
    `AttentionExtract` among them.
    """
    return None if use_fused_attn() else nn.Dropout(0.0)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_drop: nn.Module | None,
    clip: tuple[float, float] | None = None,
) -> Tensor:
    """softmax(D^-0.5 q k^T) v of tensors (..., N, D); `attn_drop` gets the map (..., N, N).

    Args:
        query, key, value: what attention is of.
        attn_drop: the module that sees the attention map, or None.
        clip: alpha and zeta of a clipped softmax, clamp((zeta - gamma) softmax + gamma, 0, 1) with
            gamma = -alpha / N. PyTorch's fused attention has no such function, so that the map is
            in memory.
    """
    if attn_drop is None and clip is None:
        return softmax_attention(query, key, value)
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    weights = scores.softmax(-1)
    if clip is not None:
        alpha, zeta = clip
        gamma = -alpha / key.shape[-2]
        weights = ((zeta - gamma) * weights + gamma).clamp(0, 1)
    return (weights if attn_drop is None else attn_drop(weights)) @ value
