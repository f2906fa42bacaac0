"""The reference of `agent_attention`, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.dispatch import without_autocast


def averages(length: int, cells: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Adaptive average pooling of `length` places to `cells`, as a matrix (cells, length).

    Cell i averages the places floor(i length / cells) .. ceil((i + 1) length / cells) - 1, which
    overlap where `cells` does not divide `length`.
    """
    i = torch.arange(cells, device=device)[:, None]
    place = torch.arange(length, device=device)
    # CoreML's converter knows no operator &.
    inside = torch.logical_and(place >= i * length // cells, place * cells < (i + 1) * length)
    return inside.to(dtype) / inside.sum(1, keepdim=True)


def agent_attention(
    projection: Tensor,
    bias: Tensor,
    weight: Tensor,
    weight_bias: Tensor | None,
    heads: int,
    size: tuple[int, int],
    grid: tuple[int, int],
) -> Tensor:
    """The equations of the package's docstring as the paper writes them."""
    dtype = projection.dtype
    wide = torch.promote_types(dtype, torch.float32)
    with without_autocast(projection):
        x = projection.to(wide)
        tokens = x.shape[1]
        prefix = tokens - size[0] * size[1]
        channels = x.shape[2] // 3
        rows, columns = (
            averages(n, cells, wide, x.device) for n, cells in zip(size, grid, strict=True)
        )
        queries = x[:, prefix:, :channels].unflatten(1, size)
        agents = (rows @ (columns @ queries).flatten(2)).unflatten(-1, (grid[1], channels))
        # Agents are rounded, as the output of a pooling layer is; later products are not.
        agents = agents.to(dtype).to(wide).flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)
        q, k, v = x.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        first, second = bias.to(dtype).to(wide)
        scale = q.shape[-1] ** -0.5
        values = (scale * agents @ k.transpose(-1, -2) + first).softmax(-1) @ v
        y = (scale * q @ agents.transpose(-1, -2) + second.transpose(-1, -2)).softmax(-1) @ values
        local = F.conv2d(
            x[:, prefix:, 2 * channels :].unflatten(1, size).permute(0, 3, 1, 2),
            weight.to(wide),
            None if weight_bias is None else weight_bias.to(wide),
            padding=weight.shape[-1] // 2,
            groups=channels,
        )
        local = F.pad(local.permute(0, 2, 3, 1).flatten(1, 2), (0, 0, prefix, 0))
        y = y.transpose(1, 2).flatten(2) + local
    return y.to(dtype)
