"""Every private or undocumented name of PyTorch and Triton that the kernels rely on.

Tried with torch 2.11 and 2.14, and with Triton 3.6 and 3.8. A new version may move any of them:
tests/kernels/test_private.py then names what is missing. Triton is imported at the first use.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode


def is_intercepted() -> bool:
    """Whether a dispatch mode or a transform of `torch.func` sees the calls of this thread."""
    return _get_current_dispatch_mode() is not None or torch._C._are_functorch_transforms_active()


def has_global_hooks() -> bool:
    """Whether hooks are registered for the calls of all modules."""
    return bool(torch.nn.modules.module._has_any_global_hook())


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a hook of a module's forward or backward pass is registered."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def get_call(module: torch.nn.Module) -> Callable | None:
    """What takes the calls of a module in place of its ``forward``, such as `torch.compile`'s.

    Neither a copy of the module nor a pickle of it has it.
    """
    return module._compiled_call_impl


def set_call(module: torch.nn.Module, call: Callable | None) -> None:
    """Let `call` take the calls of a module; None leaves them to its ``forward``."""
    module._compiled_call_impl = call


def call_forward(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module's ``forward`` with its hooks, whatever takes the calls of the module."""
    return module._call_impl(*args, **kwargs)


def has_forward_hooks(module: torch.nn.Module) -> bool:
    """Whether a hook of a module's forward pass sees, and may keep, its input or its output."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


@cache
def _get_driver() -> Any:
    from triton.runtime import driver

    return driver


def get_device() -> int:
    """The index of the GPU that Triton launches on."""
    return _get_driver().active.get_current_device()


def get_stream(device: int) -> int:
    """The handle of the stream that Triton launches on."""
    return _get_driver().active.get_current_stream(device)


def get_argument_names(kernel: Any) -> list[str]:
    """All parameters of a Triton kernel, in the order of its definition."""
    return kernel.arg_names


def make_relaunch(compiled: Any) -> Callable[..., None] | None:
    """A function that starts machine code again, without Triton's look at every argument.

    Args:
        compiled: what ``kernel[grid](...)`` returned.

    Returns:
        ``relaunch(x, y, z, stream, *arguments)`` with all arguments of the kernel, constants
        included; None if nothing was compiled.
    """
    from triton.compiler import CompiledKernel

    if not isinstance(compiled, CompiledKernel) or compiled.run is None:
        return None
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def relaunch(x: int, y: int, z: int, stream: int, *arguments: Any) -> None:
        # As TorchInductor launches: without the metadata and the two hooks of a profiler.
        run(x, y, z, stream, function, metadata, None, None, None, *arguments)

    return relaunch
