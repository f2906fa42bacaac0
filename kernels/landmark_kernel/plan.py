"""The launch decisions of `landmark_kernel`."""

from dataclasses import dataclass

import torch

from ..runtime.launch import Launch, cache_plan, pad_size

# The most landmarks along a side of a tile.
MOST_LANDMARKS = 32


@dataclass(frozen=True)
class Plan:
    """The launches of the kernel and of its gradient."""

    forward: Launch
    backward: Launch


@cache_plan
def plan(shape: torch.Size) -> Plan:
    """Plan for landmarks of one shape (B, M, heads, D)."""
    batch, marks, heads, width = shape
    block = min(MOST_LANDMARKS, pad_size(marks))
    blocks = -(-marks // block)
    constants = {
        "D": width, "P": pad_size(width), "BM": block, "num_warps": 4, "num_stages": 1,
    }  # fmt: skip
    rows, sizes = batch * heads, (marks, heads)
    return Plan(
        forward=Launch((rows, blocks, blocks), sizes, constants),
        backward=Launch((rows, blocks), sizes, constants),
    )
