"""Every private or undocumented name of PyTorch and Triton that the kernels rely on.

Tried with torch 2.11 and 2.14, and with Triton 3.6 and 3.8. A new version may move any of them:
tests/kernels/test_private.py then names what is missing. Triton is imported at the first use.
"""

import ast
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

# disable_modes(): a context in which no dispatch mode of this thread sees a call.
disable_modes = _disable_current_modes


# is_transformed(): whether a transform of `torch.func`, such as vmap, sees this thread's calls. A
# compiler can trace the question.
is_transformed = torch._C._are_functorch_transforms_active


# count_modes(): the number of dispatch modes that see this thread's calls.
count_modes = torch._C._len_torch_dispatch_stack


def is_intercepted() -> bool:
    """Whether a dispatch mode or a transform of `torch.func` sees the calls of this thread."""
    return count_modes() > 0 or is_transformed()


def compiles_package() -> bool:
    """Whether AOTInductor makes its graph, of a program that runs without this library."""
    virtualized = sys.modules.get("torch._inductor.virtualized")
    return virtualized is not None and bool(virtualized.V.aot_compilation)


# By kernel and arguments, what its launches read and write.
_accesses: dict[tuple, tuple[Any, Any]] = {}
_MOST_ACCESSES = 4096


@contextmanager
def remember_accesses() -> Iterator[None]:
    """Let a compiler look once into kernels that it launches repeatedly in the same way.

    To see which tensors a launch reads and writes, PyTorch compiles the kernel to Triton's
    intermediate code, which takes a tenth of a second or more, twice or three times per launch. The
    answer depends on the kernel and the arguments alone, but for the tensors' contents and shapes.
    """
    from torch._higher_order_ops import triton_kernel_wrap as compiler

    # Torch 2.11 asks for the written tensors alone.
    name = "identify_accessed_tensors"
    name = name if hasattr(compiler, name) else "identify_mutated_tensors"
    look = getattr(compiler, name)

    def remember(kernel: Any, arguments: dict, descriptors: dict) -> Any:
        if descriptors:
            return look(kernel, arguments, descriptors)
        configs = getattr(kernel, "configs", [])  # of an autotuner, which holds the kernel
        function = kernel.fn if configs else kernel
        key = (
            id(function),
            *[(key, value) for config in configs[:1] for key, value in config.kwargs.items()],
            *[(key, _kind_of(value)) for key, value in arguments.items()],
        )
        if key not in _accesses:
            if len(_accesses) >= _MOST_ACCESSES:
                _accesses.clear()
            # With the kernel, so that none other gets its identity.
            _accesses[key] = function, look(kernel, arguments, descriptors)
        return deepcopy(_accesses[key][1])

    setattr(compiler, name, remember)
    try:
        yield
    finally:
        setattr(compiler, name, look)


def _kind_of(value: Any) -> Any:
    """What decides about the access to an argument of a kernel: a tensor's dtype, or a value."""
    if isinstance(value, Tensor):
        return "tensor", value.dtype
    if hasattr(value, "get_dtype"):  # a tensor of TorchInductor
        return "tensor", value.get_dtype()
    return type(value), value


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


def is_compiled_copy(module: torch.nn.Module) -> bool:
    """Whether a module is what ``torch.compile(model)`` returned, and not the model itself."""
    # Its class lies in a package that takes a second to import.
    return hasattr(module, "_orig_mod")


def call_forward(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module's ``forward`` with its hooks, whatever takes the calls of the module."""
    return module._call_impl(*args, **kwargs)


def make_fake_mode() -> AbstractContextManager:
    """A mode in which tensors have shapes and no storage, on any device, and operators no work."""
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


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
    described = None if start_machine_code is None else _describe_arguments(compiled)
    if described is None:
        return None
    letters, takes, extra = described
    x, y, z = (*grid, 1, 1)[:3]
    metadata = compiled.metadata
    start = (compiled.function, x, y, z, metadata.num_warps, metadata.shared, letters)
    return MachineCode(start, takes, extra)


@cache
def _describe_arguments(compiled: Any) -> tuple[str, tuple[bool, ...], tuple] | None:
    """The types, and `MachineCode.takes` and `extra`, of what Triton has compiled, for any grid."""
    from triton.compiler import CompiledKernel

    if not isinstance(compiled, CompiledKernel):
        return None
    source, metadata = compiled.src, compiled.metadata
    names = source.fn.arg_names
    constants = {index[0] for index in source.constants}
    types = [
        "constexpr" if i in constants else source.signature[name] for i, name in enumerate(names)
    ]
    takes = tuple(kind != "constexpr" for kind in types)
    letters = "".join(
        "O" if kind[0] == "*" else _TYPES.get(kind, "?") for kind in types if kind != "constexpr"
    )
    scratch = [
        getattr(metadata, name)
        for name in ("global_scratch_size", "profile_scratch_size")
        if hasattr(metadata, name)
    ]
    if "?" in letters or any(scratch) or metadata.num_ctas != 1:
        return None
    return letters + "O" * len(scratch), takes, (None,) * len(scratch)


@cache
def _get_driver() -> Any:
    from triton.runtime import driver

    return driver


def get_target() -> Any:
    """Triton's `GPUTarget` that kernels are compiled for: this machine's, or a pretended one."""
    return _get_driver().active.get_current_target()


def make_target(arch: str) -> Any:
    """Triton's `GPUTarget` of an NVIDIA GPU, from a name such as 'sm_90'.

    Raises:
        ValueError: for another name.
    """
    from triton.backends.compiler import GPUTarget

    number = arch.removeprefix("sm_")
    if number == arch or not number.isdecimal():
        raise ValueError(f"arch is {arch!r}, expected one such as 'sm_90'")
    known = list_architectures(int(number))
    if known and arch not in known:
        raise ValueError(f"arch is {arch!r}, and Triton's assembler knows {', '.join(known)}")
    return GPUTarget("cuda", int(number), 32)


@cache
def list_architectures(number: int) -> list[str]:
    """The NVIDIA GPUs, by ascending number, that Triton's assembler for this one knows.

    Of others Triton's compiler may end its process before the assembler refuses them.
    """
    from triton.backends.nvidia.compiler import get_ptxas

    text = subprocess.run(
        [get_ptxas(number).path, "--help"], capture_output=True, text=True, check=False
    ).stdout
    return [f"sm_{n}" for n in sorted({int(n) for n in re.findall(r"'sm_(\d+)'", text)})]


def get_cache_folder() -> str:
    """The folder of Triton's cache."""
    from triton import knobs

    return knobs.cache.dir


@contextmanager
def pretend_target(target: Any) -> Iterator[None]:
    """Let Triton compile for a GPU that need not be there, and load nothing onto one.

    Args:
        target: Triton's `GPUTarget`.
    """

    class Absent:
        def get_current_target(self) -> Any:
            return target

        def get_current_device(self) -> Any:
            # Triton keeps what it compiled by device. This one is shared with no other.
            return self

        def get_current_stream(self, device: Any) -> int:
            return 0

    driver = _get_driver()
    previous = driver._active
    driver.set_active(Absent())
    try:
        yield
    finally:
        driver._active = previous


class _Pointer:
    """A tensor as Triton's look at the arguments of a launch sees one."""

    def __init__(self, x: Tensor) -> None:
        self.dtype, self._address = x.dtype, int(x.storage_offset()) * x.element_size() % 16

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        return 0


def settle_hash(kernel: Any, callers: tuple = ()) -> None:
    """Have Triton compute a kernel's hash, after the hashes of all functions that it calls.

    Triton 3.6 leaves the constants of a called function out of the caller's hash where the called
    one has no hash yet, so that a key in the cache on disk depends on what was launched before.

    Args:
        kernel: the kernel, or a function that it calls.
        callers: functions whose hashes wait for this one.
    """
    if getattr(kernel, "hash", "") is not None:  # Functions of the interpreter have none.
        return
    scope, callers = kernel.fn.__globals__, (*callers, kernel)
    for node in ast.walk(kernel.parse()):
        called = None
        if isinstance(node, ast.Name):
            called = scope.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = scope.get(node.value.id)
            called = getattr(module, node.attr, None) if isinstance(module, ModuleType) else None
        if not any(called is caller for caller in callers):
            settle_hash(called, callers)
    kernel.cache_key  # noqa: B018 (a property that computes the hash)


def describe_launch(
    kernel: Any, args: Sequence[Any], constants: dict[str, Any]
) -> tuple[str, str] | None:
    """What Triton would compile for a launch, which does not take place.

    Args:
        kernel: the kernel.
        args: its run-time arguments. Of a tensor the dtype counts, and its alignment within its
            storage, which is taken to be aligned.
        constants: its constexprs and compiler options.

    Returns:
        Types, divisibility, constants and options, for `compile_description`, and the key of the
        machine code in Triton's cache; None if this process has loaded the machine code.
    """
    from triton import knobs

    settle_hash(kernel)
    runtime: Any = knobs.runtime
    found: list[dict[str, Any]] = []

    def note(*, compile: dict[str, Any], is_manual_warmup: bool, **_: Any) -> bool:
        # A launch in another thread goes on to its compilation.
        if is_manual_warmup:
            found.append(compile)
        return is_manual_warmup

    pointers = [_Pointer(x) if isinstance(x, Tensor) else x for x in args]
    previous, runtime.jit_cache_hook = runtime.jit_cache_hook, note
    try:
        kernel.run(*pointers, grid=(1,), warmup=True, **constants)
    finally:
        runtime.jit_cache_hook = previous
    if not found:
        return None
    description = found[0]["specialization_data"]
    return description, _find_key(kernel, found[0], json.loads(description)["options"])


def _find_key(kernel: Any, compile: dict[str, Any], options: dict[str, Any]) -> str:
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.cache import get_cache_key

    backend = make_backend(get_target())
    # JSON has lists where Triton has tuples.
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    source = ASTSource(kernel, compile["signature"], compile["constants"], compile["configs"][0])
    key = get_cache_key(
        source, backend, backend.parse_options(options), get_cache_invalidating_env_vars()
    )
    return hashlib.sha256(key.encode()).hexdigest()


def has_machine_code(kernel: Any, key: str) -> bool:
    """Whether Triton's cache on disk has the machine code of a kernel under a key."""
    from triton.runtime.cache import get_cache_manager

    name = f"{kernel.__name__[:150]}.json"
    return name in (get_cache_manager(key).get_group(name) or {})


def compile_description(kernel: Any, description: str) -> Any:
    """Compile what `describe_launch` has described, into Triton's cache, unless it is there.

    Returns:
        Triton's compiled kernel.
    """
    settle_hash(kernel)
    return kernel.preload(description)


def build_launcher(compiled: Any) -> None:
    """Build what Triton 3.6 compiles by the C compiler for each signature, into its cache.

    Triton 3.8 has one launcher for all signatures.
    """
    from triton.backends.nvidia import driver

    if hasattr(driver, "compile_module_from_src"):
        driver.CudaLauncher(compiled.src, compiled.metadata)


def load_driver() -> None:
    """Load Triton's interface to the GPU's driver, which the C compiler builds once.

    Raises:
        Exception: what Triton raises where there is no compiler, or one that fails.
    """
    _get_driver().active.get_current_device()


def is_python_backward(node: Any) -> bool:
    """Whether a node of an autograd graph is the backward pass of a `torch.autograd.Function`."""
    return hasattr(node, "_forward_cls")


def get_gradient_types(node: Any) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    """Shape, dtype and device of each gradient that a node of an autograd graph takes."""
    return [(torch.Size(m.shape), m.dtype, m.device) for m in node._input_metadata]
