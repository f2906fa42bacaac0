"""Launching a compiled kernel again, at a third of what Triton's own way costs the host.

Triton looks at every argument of every call anew to find the machine code for it (25 to 45 us,
longer than most of these kernels run). Here a call that repeats an earlier one, in all but the
addresses, takes the machine code of that one.
"""

from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

# Enough for some hundred layers at some resolutions; a new resolution starts new entries.
MOST_KEPT = 16384

_kept: dict[tuple, tuple[CompiledKernel, tuple]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)``, the constexprs and compiler options by name."""
    device = args[0].device
    if device.type == "cpu":  # under the interpreter
        kernel[grid](*args, **options)
        return
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, *args, **options)
        return
    # Machine code differs by types, and by what is a multiple of 16 bytes.
    key = (
        kernel,
        device.index,
        *[(x.dtype, x.data_ptr() & 15) if isinstance(x, Tensor) else x for x in args],
        *options.values(),
    )
    kept = _kept.get(key)
    if kept is None:
        compiled = kernel[grid](*args, **options)
        if isinstance(compiled, CompiledKernel):
            if len(_kept) >= MOST_KEPT:
                _kept.clear()
            names = kernel.arg_names[len(args) :]
            _kept[key] = compiled, tuple(options[name] for name in names)
        return
    compiled, constants = kept
    compiled[(*grid, 1, 1)[:3]](*args, *constants)
