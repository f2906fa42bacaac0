"""The one rule that says whether an operator runs its Triton kernel or its reference.

Triton on a CUDA tensor of 32 or 16 bits, the reference elsewhere. `force` (a context manager)
and the environment variable ``LINSIGHT_KERNELS`` (``auto``, ``reference`` or ``triton``)
override it. Forced on a CPU tensor, ``triton`` runs under Triton's interpreter, which needs
``TRITON_INTERPRET=1`` in the environment before Triton is imported.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

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


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Where a reference computes in the precision that it chose, on the device of `x`."""
    # The meta device, on which shapes alone are computed, knows no autocast.
    if x.device.type == "meta":
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def register(schema: str, run: Callable, fake: Callable) -> Callable:
    """Define the operator ``linsight::schema``, and return it.

    Args:
        schema: in PyTorch's language, the name first.
        run: the launch of the Triton kernels; on the CPU, under Triton's interpreter.
        fake: the same function of shapes alone, for `torch.compile`.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CUDA")
    LIBRARY.impl(name, run, "CPU")
    torch.library.register_fake(f"linsight::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.linsight, name).default
