"""The launch decisions of `scaled_add`."""

from dataclasses import dataclass

import torch
import triton

from ..runtime.launch import Launch, cache_plan, count_multiprocessors

# Elements per program forward, and per tile backward: 16 bytes per load and thread, several of
# them under way.
FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 2048, 4096
# Of the backward pass: programs per multiprocessor, and tiles that are fetched ahead.
RESIDENT, STAGES = 4, 3
WARPS = 4


@dataclass(frozen=True)
class Plan:
    """The launches of the sum and of its gradient, which leaves parts (programs, C) of dscale."""

    forward: Launch
    backward: Launch
    parts: tuple[int, int]


@cache_plan
def plan(shape: torch.Size, device: torch.device) -> Plan:
    """Plan for maps of one shape (..., C)."""
    channels = shape[-1]
    padded = triton.next_power_of_2(channels)
    count = shape.numel() // channels
    constants = {"C": channels, "P": padded, "num_warps": WARPS}
    rows = max(1, FORWARD_ELEMENTS // padded)
    forward = Launch((triton.cdiv(count, rows),), (count,), {"ROWS": rows, **constants})
    rows = max(1, BACKWARD_ELEMENTS // padded)
    programs = min(triton.cdiv(count, rows), RESIDENT * count_multiprocessors(device))
    backward = Launch((programs,), (count,), {"ROWS": rows, "STAGES": STAGES, **constants})
    return Plan(forward, backward, (programs, channels))
