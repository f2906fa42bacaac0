"""The one rule that says whether an operator runs its Triton kernel or its reference.

Triton on a CUDA tensor, the reference elsewhere. `force` (a context manager) and the
environment variable ``LINSIGHT_KERNELS`` (``auto``, ``reference`` or ``triton``) override
it. Forced on a CPU tensor, ``triton`` runs under Triton's interpreter, which needs
``TRITON_INTERPRET=1`` in the environment before Triton is imported.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from torch import Tensor

CHOICES = ("auto", "reference", "triton")
HAS_TRITON = find_spec("triton") is not None


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
    if _choice == "auto":
        return x.is_cuda and HAS_TRITON
    if _choice == "reference":
        return False
    if not HAS_TRITON:
        raise RuntimeError("kernels forced to 'triton', but triton is not installed")
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"kernels forced to 'triton' on a tensor on {x.device}: move it to CUDA, or set "
            "TRITON_INTERPRET=1 before starting Python to run under Triton's interpreter"
        )
    return True
