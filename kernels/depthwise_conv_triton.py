"""The Triton kernels of `depthwise_conv2d`: their tiles, their launches.

At stride 1 a program walks down the map over a strip of columns. The window's rows live in
registers, as sums not yet complete, so that a pixel is loaded, converted and activated once a
strip and not once a tap. Few channels a thread (two, for k = 5) leave room for the k * k taps.
At stride 2 the taps are gathered one by one.

The weight gradient is summed in a fixed order, in two stages, so two runs agree bit for bit.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from .depthwise_conv_map_triton import _convolve, _gather
from .depthwise_conv_weight_triton import _sum_parts, _weigh, _weigh_gathered
from .triton_launch import launch, multiprocessors


@dataclass(frozen=True)
class Tile:
    """Columns a strip, strips times channels a program, the arithmetic an element relative to
    the other tiles, and the programs that a multiprocessor holds at once."""

    columns: int
    span: int
    cost: int
    resident: int


# By kernel size. Seven columns divide 224's maps, 56 .. 7, without a rest. Cost and residence
# are read off the machine code, see docs/performance.md.
CONVOLVE = {
    3: (Tile(4, 512, 36, 3), Tile(7, 256, 39, 3)),
    5: (Tile(4, 256, 40, 3), Tile(7, 256, 39, 2)),
    7: (Tile(4, 256, 66, 2),),
    9: (Tile(4, 128, 105, 2),),
}
WEIGH = {
    3: (Tile(4, 512, 36, 3), Tile(7, 256, 40, 3)),
    5: (Tile(4, 256, 49, 3), Tile(7, 256, 48, 2)),
    7: (Tile(4, 256, 80, 2),),
    9: (Tile(4, 128, 130, 2),),
}
WARPS = 4
# The sum of the programs' parts: many rows in flight, as it waits for little else.
SUM_ROWS, SUM_COLUMNS = 256, 16


def _layout(
    tiles: tuple[Tile, ...], kernel: int, shape: torch.Size, multiprocessors: int
) -> tuple[Tile, int, int]:
    """The tile that pads the map least, its channels a program, and the rows a program."""
    batch, height, width, channels = shape

    def work(choice: tuple[Tile, int]) -> int:
        tile, block = choice
        across = triton.cdiv(width, tile.columns * tile.span // block)
        return tile.cost * tile.span * tile.columns * triton.cdiv(channels, block) * across

    blocks = (64, 32, 128, 256)
    choices = ((tile, block) for tile in tiles for block in blocks if block <= tile.span)
    tile, block = min(choices, key=work)
    across = triton.cdiv(width, tile.columns * tile.span // block) * triton.cdiv(channels, block)

    def time(chunks: int) -> int:
        rows = triton.cdiv(height, chunks)
        programs = across * batch * triton.cdiv(height, rows)
        return triton.cdiv(programs, tile.resident * multiprocessors) * (rows + kernel + 1)

    chunks = min(range(1, max(1, height // kernel) + 1), key=time)
    return tile, block, triton.cdiv(height, chunks)


def _plan(tiles: tuple[Tile, ...], x: Tensor, kernel: int) -> tuple[tuple[int, int, int], dict]:
    """Grid, and the sizes that the stride-1 kernels share."""
    return _planned(tiles, x.shape, kernel, x.dtype == torch.float32, multiprocessors(x.device))


@lru_cache
def _planned(
    tiles: tuple[Tile, ...], shape: torch.Size, kernel: int, exact: bool, multiprocessors: int
) -> tuple[tuple[int, int, int], dict]:
    batch, height, width, channels = shape
    tile, block, rows = _layout(tiles, kernel, shape, multiprocessors)
    strips = tile.span // block
    groups = triton.cdiv(width, tile.columns * strips)
    grid = (triton.cdiv(channels, block) * groups, triton.cdiv(height, rows), batch)
    sizes = {
        "height": height,
        "width": width,
        "channels": channels,
        "rows": rows,
        "groups": groups,
        "K": kernel,
        "P": tile.columns,
        "STRIPS": strips,
        "BC": block,
        "EXACT": exact,
        "num_warps": WARPS,
        "num_stages": 1,
    }
    return grid, sizes


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]


def _gather_sizes(kernel: int, x: Tensor) -> dict:
    return {
        "K": kernel,
        "BLOCK": 32,
        "BC": 64,
        "EXACT": x.dtype == torch.float32,
        "num_warps": 4,
    }


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    gelu: bool,
    residual: bool,
    out: Tensor,
    branch: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    """Write the convolution of `x` to `out`, at stride 1 that of x + `branch` if it is there, the
    sum itself to `total` if that is there."""
    kernel = weight.shape[-1]
    flags = {"GELU": gelu, "BIAS": bias is not None, "BACKWARD": False}
    biases = weight if bias is None else bias
    if stride == 1:
        grid, sizes = _plan(CONVOLVE[kernel], x, kernel)
        launch(
            _convolve, grid,
            x, weight, biases, x if branch is None else branch, x if total is None else total, out,
            *_strides(x), *_strides(branch), *_strides(total), *_strides(out),
            RESIDUAL=residual, BRANCH=branch is not None, ADD=total is not None, **flags, **sizes,
        )  # fmt: skip
        return
    batch, height, width, channels = out.shape
    grid = (triton.cdiv(height * width, 32), triton.cdiv(channels, 64), batch)
    launch(
        _gather, grid,
        x, weight, biases, x, out, *_strides(x), 0, 0, 0, *_strides(out),
        x.shape[1], x.shape[2], height, width, channels, **flags, **_gather_sizes(kernel, x),
    )  # fmt: skip


def input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    gelu: bool,
    residual: bool,
    out: Tensor,
    add: Tensor | None = None,
) -> None:
    """Write the gradient of `x` to `out`, plus `add` if it is there (which may be `out`)."""
    kernel = weight.shape[-1]
    flags = {"GELU": gelu, "BIAS": False, "BACKWARD": True}
    if stride == 1:
        grid, sizes = _plan(CONVOLVE[kernel], x, kernel)
        launch(
            _convolve, grid,
            grad, weight, weight, x, grad if add is None else add, out,
            *_strides(grad), *_strides(x), *_strides(add), *_strides(out),
            RESIDUAL=residual, BRANCH=False, ADD=add is not None, **flags, **sizes,
        )  # fmt: skip
        return
    batch, height, width, channels = x.shape
    grid = (triton.cdiv(height * width, 32), triton.cdiv(channels, 64), batch)
    launch(
        _gather, grid,
        grad, weight, weight, x, out, *_strides(grad), *_strides(x), *_strides(out),
        grad.shape[1], grad.shape[2], height, width, channels,
        **flags, **_gather_sizes(kernel, x),
    )  # fmt: skip


def weight_gradient(
    grad: Tensor, x: Tensor, stride: int, gelu: bool, dweight: Tensor, dbias: Tensor
) -> None:
    """Write the gradients of weight (channels, 1, k, k) and bias to `dweight` and `dbias`."""
    batch, height, width, channels = grad.shape
    kernel = dweight.shape[-1]
    taps = kernel * kernel
    if stride == 1:
        grid, sizes = _plan(WEIGH[kernel], x, kernel)
        count = grid[1] * grid[2] * sizes["groups"]
    else:
        rows = triton.cdiv(height, 4)
        count = batch * triton.cdiv(height, rows)
    parts = torch.empty((count, taps + 1, channels), dtype=torch.float32, device=x.device)
    if stride == 1:
        launch(_weigh, grid, x, grad, parts, *_strides(x), *_strides(grad), GELU=gelu, **sizes)
    else:
        grid = (triton.cdiv(channels, 64), triton.cdiv(height, rows) * (taps + 1), batch)
        launch(
            _weigh_gathered, grid,
            x, grad, parts, *_strides(x), *_strides(grad),
            x.shape[1], x.shape[2], height, width, channels, rows,
            GELU=gelu, **_gather_sizes(kernel, x),
        )  # fmt: skip
    launch(
        _sum_parts, (taps + 1, -(-channels // SUM_COLUMNS)),
        parts, dweight, dbias, count, channels,
        TAPS=taps, ROWS=SUM_ROWS, BLOCK=SUM_COLUMNS, num_warps=WARPS,
    )  # fmt: skip
