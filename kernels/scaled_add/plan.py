"""The launch decisions of `scaled_add`."""

from dataclasses import dataclass

import torch
import triton

from ..runtime.launch import Launch, cache_plan, cdiv, count_multiprocessors

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
def plan(shape: torch.Size, device: torch.device, scale: bool, keep: bool) -> Plan:
    """Plan for maps of one shape (..., C).

    Args:
        shape, device: of the maps.
        scale: whether there is a scale per channel.
        keep: whether there is a factor per image.
    """
    channels = shape[-1]
    padded = triton.next_power_of_2(channels)
    count = shape.numel() // channels
    image = max(1, count // max(1, shape[0]))
    constants = {"C": channels, "P": padded, "SCALE": scale, "KEEP": keep, "num_warps": WARPS}
    rows = max(1, FORWARD_ELEMENTS // padded)
    forward = Launch((cdiv(count, rows),), (count, image), {"ROWS": rows, **constants})
    rows = max(1, BACKWARD_ELEMENTS // padded)
    programs = min(cdiv(count, rows), RESIDENT * count_multiprocessors(device))
    backward = {"ROWS": rows, "STAGES": STAGES, **constants}
    backward = Launch((programs,), (count, image), backward)
    return Plan(forward, backward, (programs, channels))
