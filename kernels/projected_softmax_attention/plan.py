"""The launch decisions of the epilogue of `projected_softmax_attention`."""

from dataclasses import dataclass

import torch
import triton

from ..runtime.launch import Launch, cache_plan, cdiv

# Elements per program: 16 bytes per load and thread, four of them under way.
ELEMENTS, WARPS = 4096, 4


@dataclass(frozen=True)
class Plan:
    """The launch of the last sum and gate, and of their gradient, which is cut alike."""

    finish: Launch


@cache_plan
def plan(shape: torch.Size) -> Plan:
    """Plan for one shape (B, N, heads, D)."""
    _, tokens, heads, width = shape
    count = shape.numel() // width
    padded = triton.next_power_of_2(width)
    block = max(1, ELEMENTS // padded)
    constants = {"D": width, "P": padded, "BLOCK": block, "num_warps": WARPS}
    return Plan(Launch((cdiv(count, block),), (count, tokens, heads), constants))
