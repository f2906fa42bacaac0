"""The one rule that decides whether an operator runs its Triton kernels or its reference.

Triton runs on a CUDA tensor of 32 or 16 bits, the reference elsewhere and under transforms of
`torch.func`. `force` (a context manager) and the environment variable ``LINSIGHT_KERNELS``
(``auto``, ``reference`` or ``triton``) override the rule. Forced on a CPU tensor, ``triton`` runs
under Triton's interpreter, which needs ``TRITON_INTERPRET=1`` in the environment before Triton is
imported.
"""

import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .compilation import collection, is_collecting
from .private import count_modes, get_target, is_intercepted, is_transformed, load_driver

CHOICES = ("auto", "reference", "triton")
HAS_TRITON = find_spec("triton") is not None
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# The widest attention head whose tiles the kernels of most operators have room for.
WIDEST_HEAD = 128
# That of linear attention, whose backward pass holds a state, where a program has 99 KiB of shared
# memory instead of 163 or more; or 163 instead of 227, of features twice as wide as the head.
WIDEST_SMALL_HEAD = 64
# The most channels of a row that a program of the norms and sums holds in registers.
WIDEST_ROW = 4096

# Classes of tensors that do no more than to hold numbers, and of arguments that are none.
PLAIN_TENSORS = frozenset((Tensor, torch.nn.Parameter))
SCALARS = frozenset((type(None), bool, int, float, str, tuple, list, torch.dtype))

MaybeTensor = TypeVar("MaybeTensor", Tensor, None, Tensor | None)


def _check_choice(choice: str, origin: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{origin} is {choice!r}, expected one of {', '.join(CHOICES)}")
    return choice


_choice = _check_choice(os.environ.get("LINSIGHT_KERNELS", "auto"), "LINSIGHT_KERNELS")


@contextmanager
def force(choice: str) -> Iterator[None]:
    """Run every operator within the block on `choice`: 'auto', 'reference' or 'triton'."""
    global _choice
    previous, _choice = _choice, _check_choice(choice, "choice")
    try:
        yield
    finally:
        _choice = previous


def current_choice() -> str:
    """What `force` or ``LINSIGHT_KERNELS`` has chosen: 'auto', 'reference' or 'triton'."""
    return _choice


def runs_triton(x: Tensor) -> bool:
    """Whether an operator whose first tensor is `x` runs its Triton kernel.

    Under a transform of `torch.func` (vmap, grad, jvp, ...) the reference runs, whatever was
    chosen: PyTorch transforms what it is made of.
    """
    if _choice == "reference" or x.dtype not in TRITON_DTYPES or is_transformed():
        return False
    if _choice == "auto":
        if not (x.is_cuda and HAS_TRITON):
            return False
        return _can_launch or _launches_nothing() or _warn_without_compiler()
    if not HAS_TRITON:
        raise RuntimeError("kernels forced to 'triton', but triton is not installed")
    if x.is_cuda and not _launches_nothing() and (lack := find_lack()):
        raise RuntimeError(f"kernels forced to 'triton', but {lack}")
    # On the meta device shapes alone are computed, and nothing is launched.
    if not (x.is_cuda or x.is_meta) and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"kernels forced to 'triton' on a tensor on {x.device}: move it to CUDA, or set "
            "TRITON_INTERPRET=1 before starting Python to run under Triton's interpreter"
        )
    return True


def _launches_nothing() -> bool:
    """Whether this call is only looked at, by a compiler or to collect its kernels."""
    return torch.compiler.is_compiling() or is_collecting()


@lru_cache
def find_lack() -> str | None:
    """What Triton lacks to launch kernels, and how to get it; None if it lacks nothing.

    Triton builds its interface to the GPU's driver with a C compiler, and keeps it in its cache.
    """
    compiler = shutil.which(os.environ.get("CC") or "gcc") or shutil.which("clang")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if compiler and header.is_file():
        return None
    try:
        load_driver()  # from the cache, perhaps
    except Exception:  # Triton raises several kinds
        if compiler:
            return f"Python's headers are missing ({header}): apt install python3-dev"
        return "no C compiler was found: apt install gcc, or set CC to the path of one"
    return None


# Whether Triton was found able to launch kernels, so that no later call asks again.
_can_launch = False


@lru_cache
def _warn_without_compiler() -> bool:
    """Whether Triton can launch kernels; if not, one warning says what is missing."""
    global _can_launch
    lack = find_lack()
    _can_launch = lack is None
    if lack is not None:
        warnings.warn(
            f"linsight's operators run in plain PyTorch, which is slow: Triton cannot launch "
            f"their kernels, because {lack}",
            stacklevel=2,
        )
    return lack is None


def state_fits(width: int, device: torch.device, doubled: bool = False) -> bool:
    """Whether a GPU has room for linear attention with heads of this width.

    Args:
        width, device: of the heads.
        doubled: whether their features are twice as wide.
    """
    # Narrow heads, which are most, ask nothing of the device.
    return width <= WIDEST_SMALL_HEAD or width <= _widest_state(device, doubled)


@torch.compiler.assume_constant_result
def _widest_state(device: torch.device, doubled: bool) -> int:
    # A pass that is only looked at may be for another GPU than this machine's.
    if is_collecting():
        return _widest_state_of_target(doubled)
    return _widest_state_of(device, doubled)


@lru_cache
def _widest_state_of(device: torch.device, doubled: bool) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return WIDEST_HEAD
    with torch.cuda.device(device):
        return _widest_state_of_target(doubled)


def _widest_state_of_target(doubled: bool) -> int:
    """By the compute capability that Triton compiles for, such as 89 for 8.9."""
    arch = get_target().arch  # of AMD's GPUs a name
    if not isinstance(arch, int):
        return WIDEST_SMALL_HEAD
    has_room = 90 <= arch < 120 or (arch in (80, 87) and not doubled)
    return WIDEST_HEAD if has_room else WIDEST_SMALL_HEAD


def rows_contiguous(x: MaybeTensor) -> MaybeTensor:
    """`x` itself when it is None or its last axis is contiguous, else a copy."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    """`x` (B, C, H, W) in the channels-last memory format, copied only if it has another."""
    if is_transformed():  # vmap copies to no memory format but the default
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which a reference computes in the precision that it chose."""
    kind = x.device.type
    # The meta device, on which shapes alone are computed, knows no autocast. Where autocast is off
    # anyway, an exported program would get a submodule for each such context, which passes that
    # rewrite programs (PyTorch's quantisation is one) do not look into.
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def stream_dtype(x: Tensor) -> torch.dtype:
    """The dtype that PyTorch multiplies `x` in: autocast's where autocast is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def check_vectors(channels: int, **vectors: Tensor | None) -> None:
    """Raise ValueError, naming the vector, unless each has one entry per channel."""
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (channels,):
            raise ValueError(
                f"{name} has shape {tuple(vector.shape)}, expected ({channels},), the channels of x"
            )


def check_factors(shape: torch.Size, **factors: Tensor) -> None:
    """Raise ValueError, naming the tensor, unless each has one factor per entry of the first axis
    of a map of this shape."""
    wanted = shape[:1] + (1,) * (len(shape) - 1)
    for name, factor in factors.items():
        if factor.shape != wanted:
            raise ValueError(
                f"{name} has shape {tuple(factor.shape)}, expected {tuple(wanted)}, a factor for "
                "each image of x"
            )


def runs_eagerly() -> bool:
    """Whether no compiler, dispatch mode or functional transform sees the calls."""
    return not torch.compiler.is_compiling() and not is_intercepted()


_observer: Callable[[str], None] | None = None


@contextmanager
def observe_eager_kernels(observer: Callable[[str], None]) -> Iterator[None]:
    """Tell an observer which kernels that run in eager calls alone take the calls of a block.

    Whether they run does not matter: on the meta device, forced to 'triton', the observer learns
    what a GPU would run. A dispatch mode sees the operators that are registered with PyTorch.

    Args:
        observer: called with the operator's name, for each call.
    """
    global _observer
    previous, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = previous


def is_direct_call(args: tuple, operator: str | None = None) -> bool:
    """Whether nothing but autograd sees a call with these arguments: eager, on plain tensors.

    Args:
        args: the arguments.
        operator: the name of an operator that shows its reference to a compiler. It asks this
            last, about a call that its kernels take, and an observer is told of the call.
    """
    if _observer is not None and operator is not None:
        _observer(operator)
    # Every eager call of every operator comes here: few functions of Python, a loop, and types
    # before `isinstance`. A tracer that is not Dynamo has a mode, or tensors of its own class.
    if is_dynamo_compiling():
        return False
    if collection.take is not None:  # as if the tensors had storage
        return True
    if count_modes() or is_transformed():
        return False
    for x in args:
        kind = type(x)
        if kind in PLAIN_TENSORS:
            if x.is_meta:
                return False
        elif kind not in SCALARS and isinstance(x, Tensor):
            return False
    return True


def cache_constants(make: Callable) -> Callable:
    """Cache a function of constant tensors, which consists of many small operations.

    Args:
        make: returns constant tensors, from hashable arguments of which the last is their device.

    Returns:
        `make` with a cache that serves eager calls; it is left out under a compiler and while a
        CUDA graph is captured.
    """
    cached = lru_cache(maxsize=64)(make)

    @wraps(make)
    def get(*key):
        # A compiler cannot trace the second question, and would break its graph there.
        if not runs_eagerly() or (
            key[-1].type == "cuda" and torch.cuda.is_current_stream_capturing()
        ):
            return make(*key)
        with torch.inference_mode(False):  # so that a later call may save them for its gradient
            return cached(*key)

    return get
