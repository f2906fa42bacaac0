"""The launch decisions of `depthwise_conv2d`, and how its kernels go through the map.

At stride 1 a program walks down the map over a strip of columns. The window's rows live in
registers, as sums not yet complete, so that a pixel is loaded, converted and activated once per
strip and not once per tap. Few channels per thread (two, for k = 5) leave room for the k * k taps.
A program has several lanes, each with a strip of one block of channels. Which strip and which block
they are is computed when the kernel runs, so that one machine code serves maps of every width.
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
        span: lanes times channels per lane, of a program.
        resident: programs that a multiprocessor holds at once.
    """

    columns: int
    span: int
    resident: int


# By kernel size, and for all widths: a tile that depends on the map is compiled anew for another
# resolution. Four columns leave little over in any map. Residence is read off the machine code,
# see docs/performance.md.
CONVOLVE = {3: Tile(4, 512, 3), 5: Tile(4, 256, 3), 7: Tile(4, 256, 2), 9: Tile(4, 128, 2)}
WEIGH = {3: Tile(4, 512, 3), 5: Tile(4, 256, 3), 7: Tile(4, 256, 2), 9: Tile(4, 128, 2)}
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
        tile = CONVOLVE[kernel]
        strips, blocks, constants = _cut_channels(tile, width, channels)
        constants |= {"RESIDUAL": residual, **flags}
        programs = triton.cdiv(strips * blocks, constants["LANES"])
        rows = _choose_rows(tile, kernel, programs * batch, height, device)
        grid, sizes = (programs, triton.cdiv(height, rows), batch), (*shape[1:], rows, strips)
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
        tile = WEIGH[kernel]
        strips, blocks, constants = _cut_channels(tile, width, channels)
        # The strips of one block, of which a program sums the products, are in one program if they
        # fit; where several blocks fit as well, a program has several.
        lanes = constants["LANES"]
        groups, each = triton.cdiv(strips, lanes), max(1, lanes // strips)
        programs = groups * triton.cdiv(blocks, each)
        rows = _choose_rows(tile, kernel, programs * batch, height, device)
        chunks = triton.cdiv(height, rows)
        weight_gradient = Launch(
            (programs, chunks, batch),
            (*shape[1:], rows, min(strips, lanes), groups, each),
            {**flags, **constants},
        )
        count = batch * chunks * groups
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


def _cut_channels(tile: Tile, width: int, channels: int) -> tuple[int, int, dict[str, int]]:
    """Strips of the map, blocks of its channels, and the constants of a stride-1 kernel."""
    # Whole cache lines, unless half of one pads the channels less.
    block = min((64, 32), key=lambda block: triton.cdiv(channels, block) * block)
    constants = {
        "P": tile.columns, "LANES": tile.span // block, "BC": block,
        "num_warps": WARPS, "num_stages": 1,
    }  # fmt: skip
    return triton.cdiv(width, tile.columns), triton.cdiv(channels, block), constants


def _choose_rows(tile: Tile, kernel: int, programs: int, height: int, device: torch.device) -> int:
    """The rows per program, for as many programs as walk down the whole maps."""

    def time(chunks: int) -> int:
        rows = triton.cdiv(height, chunks)
        waves = triton.cdiv(
            programs * triton.cdiv(height, rows), tile.resident * count_multiprocessors(device)
        )
        return waves * (rows + kernel + 1)

    chunks = min(range(1, max(1, height // kernel) + 1), key=time)
    return triton.cdiv(height, chunks)
