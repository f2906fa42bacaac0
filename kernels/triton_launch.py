"""How the kernels share out the device, and are launched.

Triton looks at every argument of every call anew to find the machine code for it (25 to 45 us,
longer than most of these kernels run). Here a call that repeats an earlier one, in all but the
addresses, takes the machine code of that one.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

MOST_SPLITS = 512
# Enough for some hundred layers at some resolutions; a new resolution starts new entries.
MOST_KEPT = 16384

_kept: dict[tuple, tuple] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)``, the constexprs and compiler options by name."""
    first = args[0]
    if not first.is_cuda:  # under the interpreter
        kernel[grid](*args, **options)
        return
    device = first.get_device()
    if device != driver.active.get_current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, *args, **options)
        return
    # Machine code differs by types, and by what is a multiple of 16 bytes. A kernel's own hash
    # looks at its source.
    key = (
        id(kernel),
        device,
        *[(x.dtype, x.data_ptr() & 15) if isinstance(x, Tensor) else x for x in args],
        *options.values(),
    )
    kept = _kept.get(key)
    if kept is None:
        compiled = kernel[grid](*args, **options)
        if isinstance(compiled, CompiledKernel):
            if len(_kept) >= MOST_KEPT:
                _kept.clear()
            constants = tuple(options[name] for name in kernel.arg_names[len(args) :])
            _kept[key] = compiled.run, compiled.function, compiled.packed_metadata, constants
        return
    run, function, metadata, constants = kept
    x, y, z = (*grid, 1, 1)[:3]
    stream = driver.active.get_current_stream(device)
    # As TorchInductor launches: without the metadata and the two hooks of a profiler.
    run(x, y, z, stream, function, metadata, None, None, None, *args, *constants)


@dataclass(frozen=True)
class Tile:
    """How a kernel runs: tokens a step, warps, pipeline stages, the programs that a
    multiprocessor holds at once, and the fewest tokens worth a program."""

    block: int
    warps: int
    stages: int
    resident: int
    least: int


@lru_cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 2  # Triton's interpreter: few programs, but more than one split
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def split_tokens(tile: Tile, rows: int, tokens: int, multiprocessors: int) -> tuple[int, int]:
    """Programs a head, and tokens a program, for the fewest steps of the whole device."""
    steps = triton.cdiv(tokens, tile.block)

    def time(splits: int) -> int:
        each = triton.cdiv(steps, splits)
        programs = rows * triton.cdiv(steps, each)
        # Starting and ending a program costs about two steps.
        return triton.cdiv(programs, tile.resident * multiprocessors) * (each + 2)

    splits = min(range(1, max(1, min(MOST_SPLITS, tokens // tile.least)) + 1), key=time)
    each = triton.cdiv(steps, splits) * tile.block
    return triton.cdiv(tokens, each), each
