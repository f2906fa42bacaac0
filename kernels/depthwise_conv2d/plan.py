"""The launch decisions of `depthwise_conv2d`, and how its kernels go through the map.

At stride 1 a program walks down the map over a strip of columns. The window's rows live in
registers, as sums not yet complete, so that a pixel is loaded, converted and activated once per
strip and not once per tap. Few channels per thread (two, for k = 5) leave room for the k * k taps.
At stride 2 the taps are gathered one by one.

The weight gradient is summed in a fixed order, in two stages, so two runs agree bit for bit.
"""

from dataclasses import dataclass

import torch
import triton

from ..runtime.launch import Launch, cache_plan, count_multiprocessors


@dataclass(frozen=True)
class Tile:
    """How a stride-1 kernel cuts the map.

    Args:
        columns: columns per strip.
        span: strips times channels per program.
        cost: arithmetic per element, relative to the other tiles.
        resident: programs that a multiprocessor holds at once.
    """

    columns: int
    span: int
    cost: int
    resident: int


# By kernel size. Seven columns divide 224's maps, 56 .. 7, without a remainder. Cost and residence
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
# Pixels and channels per program at stride 2, and output rows per part of the weight gradient.
PIXELS, CHANNELS, PART_ROWS = 32, 64, 4
# The tile that sums the programs' parts: many rows, so that many loads are under way.
SUM_ROWS, SUM_COLUMNS = 256, 16


@dataclass(frozen=True)
class Plan:
    """Launches for one signature.

    Args:
        forward, input_gradient: from a map to a map.
        weight_gradient: the parts of the weight's gradient, of shape `parts`.
        sum_parts: their sum.
    """

    forward: Launch
    input_gradient: Launch
    weight_gradient: Launch
    parts: tuple[int, int, int]
    sum_parts: Launch


@cache_plan
def plan(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    kernel: int,
    stride: int,
    activation: str | None,
    bias: bool = False,
    residual: bool = False,
    add: bool = False,
    branch: bool = False,
    scale: bool = False,
) -> Plan:
    """Plan for maps of one shape (B, H, W, C).

    Args:
        shape, dtype, device: of the input.
        kernel: the side of the window.
        stride, activation, residual: as in `depthwise_conv2d`.
        bias: whether the result has a bias.
        add: whether a tensor is added to the input's gradient.
        branch, scale: whether a residual branch, and one with a scale, is added to the input.
    """
    batch, height, width, channels = shape
    flags = {"K": kernel, "ACTIVATION": activation, "EXACT": dtype == torch.float32}
    forward = {"BIAS": bias, "BACKWARD": False}
    backward = {"BIAS": False, "BACKWARD": True}
    if stride == 1:
        grid, sizes, constants = _cut_map(CONVOLVE[kernel], kernel, shape, device)
        constants |= {"RESIDUAL": residual, **flags}
        maps = (
            Launch(
                grid,
                sizes,
                {"ADD": False, "BRANCH": branch, "SCALE": scale, **forward, **constants},
            ),
            Launch(
                grid, sizes, {"ADD": add, "BRANCH": False, "SCALE": False, **backward, **constants}
            ),
        )
        grid, sizes, constants = _cut_map(WEIGH[kernel], kernel, shape, device)
        weight_gradient = Launch(grid, sizes, {**flags, **constants})
        count = grid[1] * grid[2] * sizes[-1]
    else:
        small = (-(-height // 2), -(-width // 2))
        constants = {
            "BLOCK": PIXELS, "BC": CHANNELS, "num_warps": WARPS, **flags,
        }  # fmt: skip

        def make(inner: tuple[int, int], outer: tuple[int, int], flags: dict) -> Launch:
            blocks = (triton.cdiv(outer[0] * outer[1], PIXELS), triton.cdiv(channels, CHANNELS))
            return Launch((*blocks, batch), (*inner, *outer, channels), {**flags, **constants})

        maps = (
            make((height, width), small, forward),
            make(small, (height, width), backward),
        )
        rows = triton.cdiv(small[0], PART_ROWS)
        chunks = triton.cdiv(small[0], rows)
        count = batch * chunks
        weight_gradient = Launch(
            (triton.cdiv(channels, CHANNELS), chunks * (kernel * kernel + 1), batch),
            (height, width, *small, channels, rows),
            constants,
        )
    taps = kernel * kernel
    sum_parts = Launch(
        (taps + 1, triton.cdiv(channels, SUM_COLUMNS)),
        (count, channels),
        {"TAPS": taps, "ROWS": SUM_ROWS, "BLOCK": SUM_COLUMNS, "num_warps": WARPS},
    )
    return Plan(*maps, weight_gradient, (count, taps + 1, channels), sum_parts)


def _cut_map(
    tiles: tuple[Tile, ...], kernel: int, shape: torch.Size, device: torch.device
) -> tuple[tuple[int, int, int], tuple[int, ...], dict]:
    """Grid, sizes and constants of a stride-1 kernel; the last size is the groups of strips."""
    batch, height, width, channels = shape
    tile, block, rows = _choose_tile(tiles, kernel, shape, device)
    strips = tile.span // block
    groups = triton.cdiv(width, tile.columns * strips)
    grid = (triton.cdiv(channels, block) * groups, triton.cdiv(height, rows), batch)
    constants = {
        "P": tile.columns, "STRIPS": strips, "BC": block, "num_warps": WARPS, "num_stages": 1,
    }  # fmt: skip
    return grid, (height, width, channels, rows, groups), constants


def _choose_tile(
    tiles: tuple[Tile, ...], kernel: int, shape: torch.Size, device: torch.device
) -> tuple[Tile, int, int]:
    """The tile that pads the map least, its channels per program, and the rows per program."""
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
        return triton.cdiv(programs, tile.resident * count_multiprocessors(device)) * (
            rows + kernel + 1
        )

    chunks = min(range(1, max(1, height // kernel) + 1), key=time)
    return tile, block, triton.cdiv(height, chunks)
