"""How the kernels share out the device, and are launched.

Each operator decides grids, tiles and constants once per call signature, in its cached function
`plan`, which returns a `Plan` that holds one `Launch` per kernel. Triton itself looks at every
argument of every call anew to find the machine code for it (25 to 45 us, longer than most of
these kernels run). Here a call that repeats an earlier one, in all but the addresses, takes the
machine code of that one from its `Launch`.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .compilation import collect, is_collecting, prepare_launch
from .private import (
    MachineCode,
    describe_machine_code,
    disable_modes,
    get_device,
    get_stream,
    start_machine_code,
)
from .tracing import is_showing, trace_launch

MOST_SPLITS = 512
# Enough for the layers of a detector at the some hundred sizes of padded batches of COCO.
cache_plan = lru_cache(maxsize=4096)


def cdiv(size: int, part: int) -> int:
    """How many parts cover a size. Triton's own, which kernels call too, is seven Python calls."""
    return -(-size // part)


@dataclass(frozen=True, eq=False)
class Launch:
    """How one kernel of a plan runs.

    Args:
        grid: the number of programs along each axis; nothing runs if one of them is zero.
        sizes: the kernel's last run-time arguments, which the call signature decides.
        constants: the kernel's constexprs and Triton's compiler options, by name.
        code: what was compiled, by the types, alignments and strides of the other arguments.
    """

    grid: tuple[int, ...]
    sizes: tuple[int | float, ...]
    constants: dict[str, Any]
    code: dict[tuple, MachineCode | None] = field(default_factory=dict, repr=False)


_thread = threading.local()


@contextmanager
def observe_launches(observer: Callable) -> Iterator[None]:
    """Tell an observer of each launch of this thread, after it, also where it is only collected.

    Args:
        observer: called with the kernel, its `Launch`, its `MachineCode` and the arguments. The
            code is None under the interpreter, where PyTorch cannot start Triton's code, and where
            launches are collected.
    """
    previous = getattr(_thread, "observer", None)
    _thread.observer = observer
    try:
        yield
    finally:
        _thread.observer = previous


def launch(kernel: Any, how: Launch, *args: Any) -> None:
    """Run a kernel on tensors and their strides, with the grid, sizes and constants of `how`."""
    if 0 in how.grid:
        return
    observer = getattr(_thread, "observer", None)
    if is_collecting():
        collect(kernel, (*args, *how.sizes), how.constants)
        if observer is not None:
            observer(kernel, how, None, args)
        return
    if is_showing():
        trace_launch(kernel, how.grid, (*args, *how.sizes), how.constants)
        return
    device = args[0].get_device()
    if device >= 0 and device != get_device():
        with torch.cuda.device(device):
            launch(kernel, how, *args)
        return
    code = None
    if device < 0:
        # The interpreter computes by PyTorch, which no observer is to see.
        with disable_modes():
            kernel[how.grid](*args, *how.sizes, **how.constants)
    else:
        # Machine code differs by types, and by what is a multiple of 16 bytes. A kernel's own hash
        # looks at its source.
        key = (
            id(kernel),
            device,
            *[(x.dtype, x.data_ptr() & 15) if isinstance(x, Tensor) else x for x in args],
        )
        code = how.code.get(key)
        if code is None:
            prepare_launch(kernel, (*args, *how.sizes), how.constants)
            compiled = kernel[how.grid](*args, *how.sizes, **how.constants)
            code = how.code[key] = describe_machine_code(compiled, how.grid)
        else:
            start_machine_code(*code.start, code.choose((*args, *how.sizes)), get_stream(device))
    if observer is not None:
        observer(kernel, how, code, args)


@dataclass(frozen=True)
class Tile:
    """How a kernel that goes through tokens runs.

    Args:
        block: tokens per step.
        warps: warps per program.
        stages: stages of the software pipeline.
        resident: programs that a multiprocessor holds at once.
        least: the fewest tokens that are worth a program.
    """

    block: int
    warps: int
    stages: int
    resident: int
    least: int


@lru_cache
def count_multiprocessors(device: torch.device) -> int:
    """The multiprocessors of a GPU."""
    if device.type == "cpu":
        return 2  # Triton's interpreter: few programs, but more than one split
    if not torch.cuda.is_available():
        return 132  # an H100's: machine code is collected, which hardly depends on the number
    return torch.cuda.get_device_properties(device).multi_processor_count


def split_tokens(
    tile: Tile, rows: int, tokens: int, device: torch.device, few: int = 1
) -> tuple[int, int]:
    """Share `rows` sequences of `tokens` each out to programs.

    Args:
        tile: how a program runs.
        rows, tokens, device: what is shared, and by what.
        few: programs of a sequence whose results are merged as cheaply as one's, so that they may
            have fewer tokens than are worth a program.

    Returns:
        Programs per row, and tokens per program, for the fewest steps of the whole device.
    """
    steps = max(1, cdiv(tokens, tile.block))
    slots = tile.resident * count_multiprocessors(device)
    most = min(MOST_SPLITS, max(1, tokens // tile.least, min(few, steps)))
    choices = [each for each in cut_evenly(steps) if -(-steps // each) <= most]

    def time(each: int) -> int:
        programs = rows * -(-steps // each)
        # Starting and ending a program costs about two steps.
        return -(-programs // slots) * (each + 2)

    each = min(choices, key=time) * tile.block
    return cdiv(tokens, each), each


def cut_evenly(size: int) -> list[int]:
    """The parts, largest first, that a size can be cut into: those worth a look, not all sizes."""
    size = max(1, size)
    counts = range(1, min(size, math.isqrt(size) + 1) + 1)
    return sorted({*counts, *[-(-size // count) for count in counts]}, reverse=True)


def pad_size(size: int) -> int:
    """The power of two, at least 16, that a tile holds `size` rows or columns in."""
    return max(16, 1 << (size - 1).bit_length())
