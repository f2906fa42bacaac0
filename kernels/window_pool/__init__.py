"""Averages over the squares of a map, for each place of a window (FaViT)."""

from collections.abc import Sequence

from torch import Tensor

from ..runtime.dispatch import runs_triton
from . import operator, reference


def window_pool(
    x: Tensor, *, heads: int, window: int, dilations: Sequence[int]
) -> tuple[Tensor, ...]:
    """For each place of a window, averages over the squares of a map that have such a place.

    The local tokens of FaViT (arXiv:2312.08614, section III): the channels are shared out to the
    dilations. Of a share with dilation r the map is cut into S squares of side r (w - 1) + 1, in
    each of which w x w tokens are read, r apart; beyond the map is its reflection. For one place
    and one head they are a table of S squares and D channels, and as in the authors' code

        y_d = mean of the entries d S .. (d + 1) S - 1 of the table's rows, one after the other

    so that channels are mixed: D averages of S entries each.

    Args:
        x: (B, H, W, C), any strides with the last axis contiguous, float32, float64, float16 or
            bfloat16. C is a multiple of `heads` times the number of dilations.
        heads: heads of each share, of D = C / (shares heads) channels.
        window: w.
        dilations: r of each share.

    Returns:
        For each share (B, w^2, heads, D), in the dtype of `x`; sums are in float32 or wider.

    Raises:
        ValueError: if shapes disagree or a size is out of range.
    """
    if x.ndim != 4 or not dilations or x.shape[-1] % (heads * len(dilations)):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected (B, H, W, C) with C a multiple of heads = "
            f"{heads} times the {len(dilations)} dilations"
        )
    if window < 1 or any(dilation < 1 for dilation in dilations):
        raise ValueError(
            f"window is {window} and dilations are {tuple(dilations)}, expected 1 or more"
        )
    if not runs_triton(x):
        return reference.window_pool(x, heads, window, dilations)
    return operator.window_pool(x, heads, window, tuple(dilations)).unbind()
