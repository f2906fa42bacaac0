"""The one rule that says whether an operator runs its Triton kernel or its reference.

Triton on a CUDA tensor of 32 or 16 bits, the reference elsewhere. `force` (a context manager)
and the environment variable ``LINSIGHT_KERNELS`` (``auto``, ``reference`` or ``triton``)
override it. Forced on a CPU tensor, ``triton`` runs under Triton's interpreter, which needs
``TRITON_INTERPRET=1`` in the environment before Triton is imported.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

CHOICES = ("auto", "reference", "triton")
HAS_TRITON = find_spec("triton") is not None
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

LIBRARY = torch.library.Library("linsight", "FRAGMENT")


def _checked(choice: str, origin: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{origin} is {choice!r}, expected one of {', '.join(CHOICES)}")
    return choice


_choice = _checked(os.environ.get("LINSIGHT_KERNELS", "auto"), "LINSIGHT_KERNELS")


@contextmanager
def force(choice: str) -> Iterator[None]:
    """Run every operator within the block on `choice`: 'auto', 'reference' or 'triton'."""
    global _choice
    previous, _choice = _choice, _checked(choice, "choice")
    try:
        yield
    finally:
        _choice = previous


def runs_triton(x: Tensor) -> bool:
    """Whether an operator whose first tensor is `x` runs its Triton kernel."""
    if _choice == "reference" or x.dtype not in TRITON_DTYPES:
        return False
    if _choice == "auto":
        return x.is_cuda and HAS_TRITON
    if not HAS_TRITON:
        raise RuntimeError("kernels forced to 'triton', but triton is not installed")
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"kernels forced to 'triton' on a tensor on {x.device}: move it to CUDA, or set "
            "TRITON_INTERPRET=1 before starting Python to run under Triton's interpreter"
        )
    return True


def rows_contiguous(x: Tensor | None) -> Tensor | None:
    """`x` itself when its last axis is contiguous, else a copy."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Where a reference computes in the precision that it chose, on the device of `x`."""
    # The meta device, on which shapes alone are computed, knows no autocast.
    if x.device.type == "meta":
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def stream_dtype(x: Tensor) -> torch.dtype:
    """What PyTorch multiplies `x` in: autocast's dtype where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def check_vectors(channels: int, **vectors: Tensor | None) -> None:
    """Raise ValueError for a vector, by its name, of another length than x has channels."""
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (channels,):
            raise ValueError(
                f"{name} has shape {tuple(vector.shape)}, expected ({channels},), the channels of x"
            )


def unwatched() -> bool:
    """Whether the caller runs eagerly, with no compiler, mode or functional transform about."""
    return (
        not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
        and not torch._C._are_functorch_transforms_active()
    )


def kept(make: Callable) -> Callable:
    """`make`, whose many small operations would cost the host more than a layer, once for all.

    Args:
        make: constant tensors of its arguments, the last of which is their device.
    """
    cached = lru_cache(maxsize=64)(make)

    @wraps(make)
    def get(*key):
        if not unwatched() or (key[-1].type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return make(*key)
        with torch.inference_mode(False):  # so that a later call may save them for its gradient
            return cached(*key)

    return get


class Operator:
    """An operator of Triton kernels, called directly where it can be.

    ``linsight::NAME`` is registered through `torch.library`, for `torch.compile`, `torch.export`
    and whatever else takes a program apart. Such a call costs the host 30 to 130 us more than
    its kernels' launches, as long as many of them run; so an eager call on plain tensors goes
    straight to the launch, inside an ordinary autograd function.

    Args:
        schema: in PyTorch's language, the name first.
        run: the launch of the Triton kernels; on the CPU, under Triton's interpreter.
        fake: the same function of shapes alone.
        save: ``save(ctx, inputs, output)`` keeps what the gradient needs.
        differentiate: ``differentiate(ctx, *gradients)`` gives a gradient, or none, per input.
    """

    def __init__(
        self,
        schema: str,
        run: Callable,
        fake: Callable,
        save: Callable | None = None,
        differentiate: Callable | None = None,
    ) -> None:
        name = schema.partition("(")[0]
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, run, "CUDA")
        LIBRARY.impl(name, run, "CPU")
        torch.library.register_fake(f"linsight::{name}", fake, lib=LIBRARY)
        self.registered = getattr(torch.ops.linsight, name).default
        self.eager = run
        if differentiate is not None:
            torch.library.register_autograd(
                f"linsight::{name}", differentiate, setup_context=save, lib=LIBRARY
            )
            self.eager = eager_function(name, run, save, differentiate)

    def __call__(self, *args: Any) -> Any:
        return self.eager(*args) if plain(args) else self.registered(*args)


def plain(args: tuple) -> bool:
    """Whether nothing but autograd watches a call with these arguments."""
    return unwatched() and all(
        type(x) in (Tensor, torch.nn.Parameter) for x in args if isinstance(x, Tensor)
    )


def eager_function(
    name: str, run: Callable, save: Callable, differentiate: Callable
) -> Callable[..., Any]:
    """`run` with its gradient, for calls that are `plain`; arguments as of an `Operator`."""

    def forward(ctx, *args):
        output = run(*args)
        save(ctx, args, output)
        return output

    methods = {
        "forward": staticmethod(forward),
        "backward": staticmethod(once_differentiable(differentiate)),
    }
    function = type(name, (torch.autograd.Function,), methods)

    def call(*args: Any) -> Any:
        watched = torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in args
        )
        return function.apply(*args) if watched else run(*args)

    return call
