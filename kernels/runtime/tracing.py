"""Launches as nodes of a compiler's graph.

While a compiler makes its graph, tensors are fake. A launch is then not run but traced, with the
grid and the arguments that it would have, and the compiled program starts the kernel itself. Of its
options TorchInductor of torch 2.11 to 2.14 keeps warps and stages; a limit on registers (`maxnreg`)
gets lost.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import SymInt, Tensor
from torch.library import wrap_triton

from .private import compiles_package

_thread = threading.local()


def can_show_kernels(args: tuple) -> bool:
    """Whether a traced operator with these arguments may become its launches.

    It may in a package of AOTInductor, which runs without this library. `torch.compile` starts the
    operator itself: PyTorch compiles a kernel at least twice, for a tenth of a second to a half,
    to see which tensors a launch writes, and a model has a hundred launches. Grids and tiles are
    decided by sizes, so that none may be unknown; and elsewhere than on a GPU nothing is launched.
    """
    tensors = [x for x in args if isinstance(x, Tensor)]
    return (
        compiles_package()
        and all(x.is_cuda for x in tensors)
        and not any(isinstance(n, SymInt) for x in tensors for n in (*x.shape, *x.stride()))
    )


@contextmanager
def show_launches() -> Iterator[None]:
    """Trace the launches of this thread in the block."""
    previous = is_showing()
    _thread.showing = True
    try:
        yield
    finally:
        _thread.showing = previous


def is_showing() -> bool:
    """Whether launches of this thread are traced."""
    return getattr(_thread, "showing", False)


def trace_launch(kernel: Any, grid: tuple[int, ...], args: tuple, constants: dict) -> None:
    """Put a launch into the graph that is being made."""
    wrap_triton(kernel)[grid](*args, **constants)
