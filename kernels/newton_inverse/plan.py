"""The launch decisions of the Newton-Schulz iteration."""

from dataclasses import dataclass

from ..runtime.launch import Launch, cache_plan, pad_size
from ..runtime.mathematics import INTERPRETED

LARGEST_ON_CHIP = 16 if INTERPRETED.value else 64
WARPS = 4


@dataclass(frozen=True)
class Plan:
    """The launches of the kernels that iterate, and of those that do not."""

    iterate: Launch
    implicit_gradient: Launch
    residuals: Launch


@cache_plan
def plan(
    matrices: int, size: int, iterations: int = 0, ridge: float = 0.0, alphas: int = 0
) -> Plan:
    """Plan for matrices of size x size that fit on the chip."""
    constants = {"M": pad_size(size), "num_warps": WARPS, "num_stages": 1}
    grid = (matrices,)
    return Plan(
        iterate=Launch(grid, (ridge, size, iterations), constants),
        implicit_gradient=Launch(grid, (size,), constants),
        residuals=Launch(grid, (size, alphas), constants),
    )
