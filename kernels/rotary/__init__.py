"""Two-dimensional rotary position embedding (RAVLT, arXiv:2411.07635; RoPE, arXiv:2104.09864).

DINOv3 (arXiv:2508.10104) has the same rotation, with other angles.

A compiler sees the reference, which it fuses with what stands around it.
"""

import math

import torch
from torch import Tensor

from ..runtime.dispatch import cache_constants, is_direct_call, runs_triton
from . import operator, reference

Rotary = tuple[Tensor, Tensor]


def rotary_tables(
    size: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    temperature: float | None = None,
) -> Rotary:
    """Cosines and sines of the rotation angles along rows and columns of a map.

    With m = head_dim / 4 and i = 0 .. m - 1, RAVLT's frequencies are 10000^(-i / (m - 1)), and a
    position is a raw pixel index, so any map size extrapolates. DINOv3's, for a temperature T, are
    2 pi T^(-i / m), and positions are the centres of the tokens on a map that reaches from -1 to 1
    along both axes, so any map size interpolates.

    Args:
        size: height and width of the map, in tokens.
        head_dim: width of a head, a multiple of 4.
        dtype: of the activations; the tables are float32 or, for float64, float64.
        device: where the tables are made.
        temperature: T of DINOv3's angles, above 0, or None for RAVLT's.

    Returns:
        Row table (2, H, head_dim / 4) and column table (2, W, head_dim / 4); entry 0 of the
        first axis holds cosines, entry 1 sines.

    Raises:
        ValueError: if `head_dim` is not a positive multiple of 4.
    """
    if head_dim < 4 or head_dim % 4:
        raise ValueError(
            f"head_dim is {head_dim}; a two-dimensional rotary embedding pairs channels along "
            "two axes and needs a multiple of 4"
        )
    dtype = torch.promote_types(dtype, torch.float32)
    return _tables(*size, head_dim, temperature, dtype, device)


@cache_constants
def _tables(
    height: int,
    width: int,
    head_dim: int,
    temperature: float | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Rotary:
    count = head_dim // 4
    # The authors round the frequencies to float32, whatever the precision of the model.
    if temperature is None:
        exponent = torch.linspace(0, 1, count, dtype=torch.float32, device=device)
        frequency = (1.0 / 10000**exponent).to(dtype)
    else:
        exponent = torch.arange(count, dtype=torch.float32, device=device) / count
        frequency = 2 * math.pi / (temperature**exponent).to(dtype)

    def table(length: int) -> Tensor:
        position = torch.arange(length, dtype=dtype, device=device)
        if temperature is not None:
            position = (position + 0.5) / length * 2 - 1
        angle = position[:, None] * frequency
        return torch.stack((angle.cos(), angle.sin()))

    return table(height), table(width)


def apply_rotary(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate neighbouring channel pairs of `x` by the angles of each token's row and column.

    A pair (a, b) turned by t becomes (a cos t - b sin t, b cos t + a sin t). The first half
    of a head's channels turns with the row, the second half with the column.

    Args:
        x: (B, N, heads, D), tokens in row-major order; any floating dtype.
        rotary: the tables of `rotary_tables`, with H * W = N.

    Returns:
        (B, N, heads, D), in the dtype of `x`, computed in the dtype of the tables.

    Raises:
        ValueError: if the tables are not for N tokens.
    """
    check_rotary(rotary, "x", x.shape[1])
    rows, columns = rotary
    if rows.dtype == torch.float32 and runs_triton(x) and is_direct_call((x, *rotary), "rotary"):
        return operator.turn(x, rows, columns, False)
    return reference.apply_rotary(x, rotary)


def check_rotary(rotary: Rotary, name: str, tokens: int) -> None:
    """Raise ValueError for tables of a map of more or fewer tokens than `name` has."""
    rows, columns = rotary
    if rows.shape[1] * columns.shape[1] != tokens:
        raise ValueError(
            f"rotary tables are for a map of {rows.shape[1]} x {columns.shape[1]} tokens, "
            f"but {name} has {tokens}"
        )
