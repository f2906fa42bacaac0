"""The launch decisions of `apply_rotary`."""

from dataclasses import dataclass

import torch

from ..runtime.launch import Launch, cache_plan

# Elements per program: 16 bytes per load and thread, four of them under way.
ELEMENTS, WARPS = 4096, 4


@dataclass(frozen=True)
class Plan:
    """The launch that turns, or turns back."""

    forward: Launch


@cache_plan
def plan(shape: torch.Size, columns: torch.Size, rows: torch.Size, back: bool) -> Plan:
    """Plan for x of one shape (B, N, heads, D), and tables of the given shapes."""
    _, tokens, heads, width = shape
    count = shape.numel() // width
    padded = 1 << (width - 1).bit_length()
    block = max(1, ELEMENTS // padded)
    # From a table's cosines to its sines.
    row_stride, column_stride = rows[1:].numel(), columns[1:].numel()
    sizes = (count, tokens, heads, columns[1], row_stride, column_stride)
    constants = {"D": width, "P": padded, "BLOCK": block, "BACK": back, "num_warps": WARPS}
    return Plan(Launch((-(-count // block),), sizes, constants))
