"""The launch decisions of the focused power map."""

from dataclasses import dataclass

import torch
import triton

from ..runtime.launch import Launch, cache_plan, cdiv, count_multiprocessors

# Elements that a program holds, and programs per multiprocessor for each of queries and keys:
# forward, and backward, which has twice as much in registers.
FORWARD_ELEMENTS, FORWARD_RESIDENT = 4096, 4
BACKWARD_ELEMENTS, BACKWARD_RESIDENT = 2048, 2
STAGES = 1
WARPS = 4
# Rows of a backward tile that one thread has: 16 bytes of each.
THREAD_ROWS = 2
# The tile that sums the parts.
SUM_ROWS, SUM_COLUMNS = 128, 16


@dataclass(frozen=True)
class Plan:
    """The launches of the map, of its gradient, and of the sum of the gradient's parts.

    Args:
        parts: the shape of the parts of the scale's gradient.
        forward, backward, scale_gradient: the launches.
    """

    parts: tuple[int, int]
    forward: Launch
    backward: Launch
    scale_gradient: Launch


@cache_plan
def plan(
    channels: int, tokens: int, query_stride: int, key_stride: int, power: int, device: torch.device
) -> Plan:
    """Plan for `tokens` rows of `channels`, whose strides differ between queries and keys."""
    padded = triton.next_power_of_2(channels)
    constants = {"C": channels, "P": padded, "num_warps": WARPS}

    def make(elements: int, resident: int) -> tuple[tuple[int, int], dict]:
        rows = max(1, elements // padded)
        programs = min(cdiv(tokens, rows), resident * count_multiprocessors(device))
        # The second axis of the grid: queries, and keys.
        return (programs, 2), {**constants, "ROWS": rows, "POWER": power}

    sizes = (query_stride, key_stride, tokens)
    grid, backward = make(BACKWARD_ELEMENTS, BACKWARD_RESIDENT)
    backward |= {"FOLD": max(1, backward["ROWS"] // THREAD_ROWS), "STAGES": STAGES}
    parts = (2 * grid[0], padded)
    sum_tile = {**constants, "ROWS": SUM_ROWS, "BLOCK": SUM_COLUMNS}
    forward_grid, forward = make(FORWARD_ELEMENTS, FORWARD_RESIDENT)
    return Plan(
        parts=parts,
        forward=Launch(forward_grid, sizes, forward),
        backward=Launch(grid, sizes, backward),
        scale_gradient=Launch((cdiv(channels, SUM_COLUMNS),), parts[:1], sum_tile),
    )
