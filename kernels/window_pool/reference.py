"""The reference of `window_pool`, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.dispatch import cache_constants


def window_pool(x: Tensor, heads: int, window: int, dilations: Sequence[int]) -> tuple[Tensor, ...]:
    """Gather the squares' tokens and average; see the public function."""
    shares = x.chunk(len(dilations), -1)
    return tuple(
        _pool(share, heads, window, dilation)
        for share, dilation in zip(shares, dilations, strict=True)
    )


def _pool(x: Tensor, heads: int, window: int, dilation: int) -> Tensor:
    extent = dilation * (window - 1) + 1
    down, across = ((side + extent - 1) // extent for side in x.shape[1:3])
    rows, columns = (
        places(side, squares, window, dilation, x.device)
        for side, squares in zip(x.shape[1:3], (down, across), strict=True)
    )
    x = x[:, rows[:, None], columns].unflatten(3, (heads, -1))
    x = x.unflatten(2, (across, window)).unflatten(1, (down, window))
    x = x.permute(0, 2, 4, 5, 1, 3, 6)  # (B, w, w, heads, down, across, D)
    return x.flatten(4).unflatten(4, (-1, down * across)).mean(-1).flatten(1, 2)


@cache_constants
def places(side: int, squares: int, window: int, dilation: int, device: torch.device) -> Tensor:
    """The tokens that are read along an axis: some per square, beyond the map its reflection."""
    number = torch.arange(squares * window, device=device)
    square, step = number // window, number % window
    extent = dilation * (window - 1) + 1
    period = 2 * side - 2 if side > 1 else 1
    place = (square * extent + step * dilation) % period
    return torch.minimum(place, period - place)
