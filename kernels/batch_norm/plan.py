"""The launch decisions of `batch_norm`, and the order of its kernels.

    forward     gather      a mean, a sum of squares about it and a count, per program
                reduce      theirs to one part, which goes to the other processes of a group
                merge       all parts, in a fixed order; the running statistics
                normalize
    backward    sums        of the norm's gradient and of its product with the norm, per program
                input gradient

A map's pixels are rows of channels. Squares are summed about a running mean (Welford): with the
mean far from zero, sums of squares would cancel. The norm and its activation are computed again
from the map, not kept.
"""

from dataclasses import dataclass

import torch
import triton

from ..runtime.launch import Launch, cache_plan, cdiv, count_multiprocessors

# Elements of a tile of the kernels that sum, their programs per multiprocessor, and how many tiles
# are fetched ahead; then the elements of a tile of the kernels that write a map.
SUM_ELEMENTS, RESIDENT, STAGES = 4096, 2, 3
MAP_ELEMENTS = 2048
WARPS = 4
# The tile that merges the programs' parts.
MERGE_ROWS, MERGE_COLUMNS = 256, 16


@dataclass(frozen=True)
class Plan:
    """Launches for one signature.

    Args:
        programs: how many parts the kernels that sum leave.
        gather, normalize, normalize_running, gradient_sums, input_gradient: the launches.
    """

    programs: int
    gather: Launch
    normalize: Launch
    normalize_running: Launch
    gradient_sums: Launch
    input_gradient: Launch


@dataclass(frozen=True)
class MergePlan:
    """The launches that merge parts of statistics: to one part, and to the statistics."""

    reduce: Launch
    merge: Launch


@cache_plan
def plan(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    activation: str | None = None,
    eps: float = 0.0,
    residual: bool = False,
    addend: bool = False,
) -> Plan:
    """Plan for maps of one shape (B, C, H, W).

    Only `normalize_running` needs `eps`; a residual concerns `normalize` and `input_gradient`, an
    addend `normalize` alone.
    """
    channels = shape[1]
    padded = triton.next_power_of_2(channels)
    pixels = shape.numel() // channels
    exact = dtype == torch.float32

    def make(elements: int, **flags) -> tuple[int, dict]:
        rows = max(1, elements // padded)
        constants = {"C": channels, "P": padded, "ROWS": rows, **flags, "num_warps": WARPS}
        return cdiv(pixels, rows), constants

    activates = {"ACTIVATION": activation, "EXACT": exact}
    tiles, gather = make(SUM_ELEMENTS, STAGES=STAGES)
    programs = min(tiles, RESIDENT * count_multiprocessors(device))
    _, sums = make(SUM_ELEMENTS, STAGES=STAGES, **activates)
    tiles, write = make(MAP_ELEMENTS, **activates)
    return Plan(
        programs,
        gather=Launch((programs,), (pixels,), gather),
        normalize=Launch((tiles,), (pixels,), {**write, "RESIDUAL": residual, "ADDEND": addend}),
        normalize_running=Launch((tiles,), (pixels, eps), write),
        gradient_sums=Launch((programs,), (pixels,), sums),
        input_gradient=Launch((tiles,), (pixels,), {**write, "RESIDUAL": residual}),
    )


@cache_plan
def plan_merge(parts: int, channels: int, momentum: float = 0.0, eps: float = 0.0) -> MergePlan:
    """Plan for `parts` parts of statistics; only `merge` needs momentum and eps."""
    constants = {
        "C": channels, "ROWS": MERGE_ROWS, "COLUMNS": MERGE_COLUMNS, "num_warps": WARPS,
    }  # fmt: skip
    grid = (cdiv(channels, MERGE_COLUMNS),)
    return MergePlan(
        reduce=Launch(grid, (parts,), constants),
        merge=Launch(grid, (parts, momentum, eps), constants),
    )
