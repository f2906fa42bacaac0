"""Every private or undocumented name of PyTorch and Triton that the kernels rely on.

Tried with torch 2.11 and 2.14, and with Triton 3.6 and 3.8. A new version may move any of them:
tests/kernels/test_private.py then names what is missing. Triton is imported at the first use.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes as disable_modes
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = ["disable_modes"]


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


def _find_binding(name: str) -> Any:
    """A function of PyTorch's; None where PyTorch was built without GPUs."""
    found: Any = torch._C
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


# Of these four TorchInductor makes its launches.
# get_device(): the index of the current GPU.
get_device = _find_binding("_cuda_getDevice")
# get_stream(device): the handle of the current stream of a GPU.
get_stream = _find_binding("_cuda_getCurrentRawStream")
# empty_strided_cuda(shape, strides, dtype): a new tensor on the current GPU, for a third of the
# host's time of `torch.empty`.
empty_strided_cuda = _find_binding("_dynamo.guards._empty_strided_cuda")
# start_machine_code(*MachineCode.start, arguments, stream): tensors among the arguments may be
# addresses.
start_machine_code = _find_binding("_StaticCudaLauncher._launch_kernel")


@dataclass(frozen=True)
class MachineCode:
    """A compiled Triton kernel with its grid.

    Args:
        start: the first arguments of `start_machine_code`.
        takes: whether it takes an argument for each parameter of the kernel; it takes none for a
            constant.
        extra: what it takes after these.
    """

    start: tuple
    takes: tuple[bool, ...]
    extra: tuple

    def choose(self, arguments: tuple, first: int = 0) -> tuple:
        """What the machine code takes of the kernel's arguments from the parameter `first` on.

        Our kernels have their constants last, which may be left out.
        """
        return (*[x for x, taken in zip(arguments, self.takes[first:]) if taken], *self.extra)  # noqa: B905


# How PyTorch's launcher reads an argument, by Triton's name of its type.
_TYPES = {"i1": "i", "i8": "b", "i16": "h", "i32": "i", "i64": "l", "u64": "K", "fp32": "f"}


def describe_machine_code(compiled: Any, grid: tuple[int, ...]) -> MachineCode | None:
    """What starts a kernel's machine code again, without Triton's look at every argument.

    Args:
        compiled: what ``kernel[grid](...)`` returned.
        grid: the number of programs along each axis.

    Returns:
        None if nothing was compiled, or if PyTorch's launcher cannot start it.
    """
    from triton.compiler import CompiledKernel

    if not isinstance(compiled, CompiledKernel) or start_machine_code is None:
        return None
    source, metadata = compiled.src, compiled.metadata
    names = source.fn.arg_names
    constants = {index[0] for index in source.constants}
    types = [
        "constexpr" if i in constants else source.signature[name] for i, name in enumerate(names)
    ]
    takes = tuple(kind != "constexpr" for kind in types)
    letters = ["O" if kind[0] == "*" else _TYPES.get(kind) for kind in types if kind != "constexpr"]
    scratch = [
        getattr(metadata, name)
        for name in ("global_scratch_size", "profile_scratch_size")
        if hasattr(metadata, name)
    ]
    if None in letters or any(scratch) or metadata.num_ctas != 1:
        return None
    types = "".join(letters) + "O" * len(scratch)
    x, y, z = (*grid, 1, 1)[:3]
    start = (compiled.function, x, y, z, metadata.num_warps, metadata.shared, types)
    return MachineCode(start, takes, (None,) * len(scratch))
