"""The launch decisions of `layer_norm`, `rms_norm` and `add_layer_norm`."""

from dataclasses import dataclass

import torch
import triton

from ..runtime.launch import Launch, cache_plan, cdiv, count_multiprocessors

# Elements that a program holds: 16 bytes per load and thread, and several rows in flight.
ELEMENTS = 4096
# Of the backward pass: programs per multiprocessor, and tiles that are fetched ahead, which pays
# as long as a tile has many rows.
RESIDENT = 2
STAGES, ROWS_WORTH_STAGES = 3, 32
# With a layer scale it has a third sum and a third map in registers, 160 of them per thread; and
# with a factor per image, which rows of several images need, 4096 elements spill.
SCALED_ELEMENTS, SCALED_RESIDENT = 2048, 3
WARPS = 4


@dataclass(frozen=True)
class Plan:
    """The launches of the norm and of its gradient.

    Args:
        forward, backward: the launches.
        parts: the shape of the parts of the gradients of weight, bias and, if any, scale.
    """

    forward: Launch
    backward: Launch
    parts: tuple[int, int, int]


@cache_plan
def plan(
    shape: torch.Size,
    device: torch.device,
    eps: float,
    branch: bool,
    scale: bool,
    keep: bool = False,
    total: bool = False,
    center: bool = True,
) -> Plan:
    """Plan for maps of one shape (..., C).

    Args:
        shape, device: of x.
        eps: added to the variance.
        branch, scale: whether there is a residual branch to add, and a scale for it. The backward
            pass without a scale has no branch: it is given the sum.
        keep: whether the branch has a factor per image.
        total: whether the sum has a gradient of its own.
        center: whether the mean is taken off, and a bias added.
    """
    channels = shape[-1]
    padded = triton.next_power_of_2(channels)
    tokens = shape.numel() // channels
    constants = {"C": channels, "P": padded, "CENTER": center, "num_warps": WARPS}
    rows = max(1, (SCALED_ELEMENTS if keep else ELEMENTS) // padded)
    sizes = tokens, max(1, tokens // max(1, shape[0])), eps
    forward = {"ROWS": rows, "BRANCH": branch, "SCALE": scale, "KEEP": keep, **constants}
    forward = Launch((cdiv(tokens, rows),), sizes, forward)
    few = scale or keep
    elements, resident = (SCALED_ELEMENTS, SCALED_RESIDENT) if few else (ELEMENTS, RESIDENT)
    rows = max(1, elements // padded)
    programs = min(cdiv(tokens, rows), resident * count_multiprocessors(device))
    backward = {
        "ROWS": rows, "TOTAL": total, "SCALE": scale, "KEEP": keep,
        "STAGES": STAGES if rows >= ROWS_WORTH_STAGES else 1, **constants,
    }  # fmt: skip
    backward = Launch((programs,), sizes, backward)
    return Plan(forward, backward, (programs, 1 + center + scale, channels))
