"""The launch decisions of `depthwise_conv2d`, and how its kernels go through the map.

At stride 1 a program walks down the map over a strip of columns. The window's rows live in
registers, as sums not yet complete, so that a pixel is loaded, converted and activated once per
strip and not once per tap. Two channels per thread leave room for the k * k taps.
A program has one or more lanes, each with a strip of one block of channels. Which strip and which
block they are is computed when the kernel runs, so that one code serves maps of every width.
A window of one column is one of one row on the map turned round, which is a change of strides.
With a dilation d it walks down one of d * d phases, which has every d-th pixel of every d-th row:
there the window has no gaps. Phases are read and written where they lie in the map.
At stride 2 the taps are gathered one by one.

The weight gradient is summed in a fixed order, in two stages, so two runs agree bit for bit.
"""

from dataclasses import dataclass

import torch

from ..runtime.launch import Launch, cache_plan, cdiv, count_multiprocessors, cut_evenly


@dataclass(frozen=True)
class Tile:
    """How a stride-1 kernel cuts the map.

    Args:
        columns: columns per strip.
        warps: warps per program.
        resident: programs that a multiprocessor holds at once.
        busy: programs of a multiprocessor whose arithmetic takes as long as the memory's answer.
    """

    columns: int
    warps: int
    resident: int
    busy: int


# By rows of the window, and for all widths: a tile that depends on the map is compiled anew for
# another resolution. Seven columns divide the maps of 224 px. Squares are measured, see
# docs/performance.md; `resident` and `busy` of one row are told from registers and instructions.
CONVOLVE = {
    1: Tile(7, 1, 12, 10),
    3: Tile(7, 1, 18, 30), 5: Tile(7, 1, 11, 8), 7: Tile(4, 1, 9, 9), 9: Tile(4, 1, 8, 8),
}  # fmt: skip
# With the gradient of an activation, whose input takes registers of its own.
SLOPE = {
    1: Tile(7, 1, 14, 8),
    3: Tile(4, 1, 24, 40), 5: Tile(4, 1, 14, 14), 7: Tile(4, 1, 9, 9), 9: Tile(4, 1, 8, 8),
}  # fmt: skip
# Four strips side by side share what they read twice.
WEIGH = {
    1: Tile(7, 1, 10, 8),
    3: Tile(7, 4, 3, 5), 5: Tile(7, 4, 2, 3), 7: Tile(4, 4, 2, 3), 9: Tile(4, 4, 2, 2),
}  # fmt: skip
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
    window: tuple[int, int],
    stride: int,
    activation: str | None,
    bias: bool = False,
    residual: bool = False,
    add: bool = False,
    branch: bool = False,
    scale: bool = False,
    own: bool = False,
    dilation: int = 1,
    result_activation: str | None = None,
) -> Plan:
    """Plan for maps of one shape (B, H, W, C).

    Args:
        shape, dtype, device: of the input.
        window: rows and columns of the window: a square, or one row.
        stride, dilation, activation, residual, result_activation: as in `depthwise_conv2d`.
        bias: whether the result has a bias.
        add: whether a tensor is added to the input's gradient.
        branch, scale: whether a residual branch, and one with a scale, is added to the input.
        own: whether each image has a window of its own.
    """
    batch, height, width, channels = shape
    tall, broad = window
    taps = tall * broad
    # From the window of an image to that of the next one.
    step = channels * taps if own else 0
    flags = {"KH": tall, "KW": broad, "ACTIVATION": activation, "EXACT": dtype == torch.float32}
    forward = {"BIAS": bias, "BACKWARD": False, "RESULT": result_activation}
    backward = {"BIAS": False, "BACKWARD": True, "RESULT": None}
    if stride == 1:
        # The first phase, which no other exceeds in rows or columns.
        high, wide = cdiv(height, dilation), cdiv(width, dilation)
        phases = dilation * dilation

        def make_map(tile: Tile, flags: dict) -> Launch:
            programs, strips, constants = _cut(tile, wide, channels)
            programs *= phases
            rows, _ = _share(tile, tall, programs, high, batch, 1, 0, device)
            grid = (programs, cdiv(high, rows), batch)
            constants |= {"RESIDUAL": residual, "DILATED": dilation > 1, **flags}
            return Launch(grid, (*shape[1:], rows, strips, step, dilation), constants)

        slope = activation is not None
        maps = (
            make_map(
                CONVOLVE[tall],
                {"ADD": False, "BRANCH": branch, "SCALE": scale, **forward, **flags},
            ),
            make_map(
                SLOPE[tall] if slope else CONVOLVE[tall],
                {"ADD": add, "BRANCH": False, "SCALE": False, **backward, **flags},
            ),
        )
        tile = WEIGH[tall]
        programs, strips, constants = _cut(tile, wide, channels)
        programs *= phases
        # The parts are float32, written and read again.
        end = 2 * (taps + 1) // tile.columns
        most = 1 if own else max(batch, 1)
        rows, images = _share(tile, tall, programs, high, batch, most, end, device)
        chunks, many = cdiv(high, rows), cdiv(batch, images)
        weight_gradient = Launch(
            (programs, chunks, many),
            (*shape[1:], rows, strips, batch, images, dilation),
            {"DILATED": dilation > 1, **flags, **constants},
        )
        count = many * chunks * phases * strips
        sums = batch if own else 1
    else:
        small = (-(-height // 2), -(-width // 2))
        constants = {
            "BLOCK": PIXELS, "BC": CHANNELS, "num_warps": 4, **flags,
        }  # fmt: skip

        def make(inner: tuple[int, int], outer: tuple[int, int], flags: dict) -> Launch:
            blocks = (cdiv(outer[0] * outer[1], PIXELS), cdiv(channels, CHANNELS))
            return Launch((*blocks, batch), (*inner, *outer, channels), {**flags, **constants})

        maps = (
            make((height, width), small, forward),
            make(small, (height, width), backward),
        )
        rows = max(1, cdiv(small[0], PART_ROWS))
        chunks = cdiv(small[0], rows)
        count, sums = batch * chunks, 1
        weight_gradient = Launch(
            (cdiv(channels, CHANNELS), chunks * (taps + 1), batch),
            (height, width, *small, channels, rows),
            constants,
        )
    sum_parts = Launch(
        (taps + 1, cdiv(channels, SUM_COLUMNS), sums),
        (count // max(sums, 1), channels),
        {"TAPS": taps, "ROWS": SUM_ROWS, "BLOCK": SUM_COLUMNS, "num_warps": 4},
    )
    return Plan(*maps, weight_gradient, (count, taps + 1, channels), sum_parts)


def _cut(tile: Tile, width: int, channels: int) -> tuple[int, int, dict[str, int]]:
    """Programs per phase, strips per block of channels, and the constants of a stride-1 kernel."""
    # A warp has one strip of 64 channels, or more strips of fewer where that pads them less.
    if channels > 16:
        block = min((64, 32), key=lambda block: cdiv(channels, block) * block)
    else:
        block = 16 if channels > 8 else 8
    lanes = tile.warps * 64 // block
    strips = cdiv(width, tile.columns)
    constants = {
        "P": tile.columns, "LANES": lanes, "BC": block, "num_warps": tile.warps, "num_stages": 1,
    }  # fmt: skip
    return cdiv(cdiv(channels, block) * strips, lanes), strips, constants


def _share(
    tile: Tile, tall: int, programs: int, height: int, batch: int, most: int, end: int,
    device: torch.device,
) -> tuple[int, int]:  # fmt: skip
    """Rows and images per program, for the shortest time of the whole device.

    Args:
        tall: rows of the window.
        programs: those that walk down one image.
        most: the most images per program.
        end: what a program does at its end, in rows.
    """
    multiprocessors = count_multiprocessors(device)

    def time(rows: int, images: int) -> int:
        count = programs * -(-height // rows) * -(-batch // images)
        waves, rest = divmod(-(-count // multiprocessors), tile.resident)
        row = waves * max(tile.resident, tile.busy) + (max(rest, tile.busy) if rest else 0)
        return row * (images * (rows + tall + 1) + end)

    choices = [(r, 1 << power) for r in cut_evenly(height) for power in range(most.bit_length())]
    return min(choices, key=lambda choice: time(*choice))
