"""The private names that the kernels rely on: a PyTorch or Triton that lacks one is told here."""

import copy
import importlib
import inspect
import pickle

import pytest
import torch

from linsight.kernels.runtime import private
from linsight.kernels.runtime.dispatch import HAS_TRITON

from .conftest import INTERPRETED

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def find(path: str) -> object:
    """What a dotted path names; fails with the part that is missing."""
    module, *names = path.split(":")
    try:
        found = importlib.import_module(module)
    except ImportError:
        pytest.fail(f"{versions()} has no module {module}: adapt kernels/runtime/private.py")
    for name in names[0].split("."):
        if not hasattr(found, name):
            pytest.fail(f"{versions()} has no {path}: adapt kernels/runtime/private.py")
        found = getattr(found, name)
    return found


def versions() -> str:
    triton = importlib.import_module("triton").__version__ if HAS_TRITON else "missing"
    return f"torch {torch.__version__} with triton {triton}"


@needs_triton
def test_the_assembler_names_its_gpus() -> None:
    known = private.list_architectures(90)
    assert {"sm_80", "sm_90"} <= set(known), f"{versions()} says otherwise what ptxas knows"
    assert "sm_120" in private.list_architectures(120)


@pytest.mark.parametrize(
    "path",
    [
        "torch:_C._are_functorch_transforms_active",
        "torch.nn.modules.module:_has_any_global_hook",
        "torch.nn:Module._call_impl",
        "torch:_C._len_torch_dispatch_stack",
        "torch._subclasses:FakeTensorMode",
    ],
)
def test_names_of_pytorch(path: str) -> None:
    assert callable(find(path))


def test_interception_is_noticed() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    assert not private.is_intercepted()
    with FlopCounterMode(display=False):
        assert private.is_intercepted(), f"{versions()} hides its dispatch modes"
    seen = []
    torch.func.vmap(lambda x: seen.append(private.is_intercepted()) or x)(torch.zeros(2))
    assert seen == [True], f"{versions()} hides its functional transforms"


def test_calls_of_a_module_are_taken() -> None:
    module = torch.nn.Identity()
    private.set_call(module, lambda x: 2 * x)
    message = f"{versions()} does not ask for _compiled_call_impl: adapt kernels/runtime/private.py"
    assert module(1) == 2, message
    assert private.call_forward(module, 1) == 1, message
    assert private.get_call(copy.deepcopy(module)) is None
    assert pickle.loads(pickle.dumps(module))(1) == 1


def test_what_a_compiler_returns_is_recognised() -> None:
    module = torch.nn.Identity()
    message = f"{versions()} does not set _orig_mod: adapt kernels/runtime/private.py"
    assert private.is_compiled_copy(torch.compile(module, backend="eager")), message
    assert not private.is_compiled_copy(module)


def test_hooks_are_noticed() -> None:
    for register in (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ):
        module = torch.nn.Identity()
        assert not private.has_hooks(module)
        getattr(module, register)(lambda *_: None)
        assert private.has_hooks(module), f"{versions()} keeps hooks elsewhere"
    assert not private.has_global_hooks()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert private.has_global_hooks()
    handle.remove()


def test_packages_are_told_from_other_programs() -> None:
    virtualized = importlib.import_module("torch._inductor.virtualized")
    assert not private.compiles_package()
    with virtualized.V.set_aot_compilation(True):
        assert private.compiles_package()
    source = inspect.getsource(importlib.import_module("torch._inductor.compile_fx"))
    assert "set_aot_compilation(True)" in source, f"{versions()} marks packages elsewhere"


@needs_triton
@pytest.mark.parametrize(
    "path",
    [
        "triton.compiler:CompiledKernel",
        "triton.compiler:CompiledKernel.run",
        "triton.compiler:ASTSource",
        "triton.compiler:make_backend",
        "triton.backends.compiler:GPUTarget",
        "triton.runtime.cache:get_cache_key",
        "triton.runtime.cache:get_cache_manager",
        "triton.runtime.jit:JITFunction.preload",
        "triton.runtime:driver.set_active",
        "triton._C.libtriton:get_cache_invalidating_env_vars",
        "triton.runtime:driver",
        "triton.runtime.jit:JITFunction",
    ],
)
def test_names_of_triton(path: str) -> None:
    find(path)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
def test_attributes_of_machine_code() -> None:
    """Those that its constructor or its lazy loading sets, found in the source."""
    source = inspect.getsource(find("triton.compiler:CompiledKernel"))
    for name in ("function", "src", "metadata"):
        assert f"self.{name}" in source, (
            f"CompiledKernel of {versions()} sets no {name}: adapt kernels/runtime/private.py"
        )
    source = inspect.getsource(find("triton.compiler:ASTSource"))
    for name in ("constants", "signature", "fn"):
        assert f"self.{name} =" in source, (
            f"ASTSource of {versions()} sets no {name}: adapt kernels/runtime/private.py"
        )


@pytest.mark.gpu
def test_bindings_of_a_gpu() -> None:
    assert private.get_device() == torch.cuda.current_device()
    assert private.get_stream(0) == torch.cuda.current_stream(0).cuda_stream
    x = private.empty_strided_cuda((2, 3), (1, 2), torch.bfloat16)
    assert (x.shape, x.stride(), x.dtype) == ((2, 3), (1, 2), torch.bfloat16)
    assert private.start_machine_code is not None, (
        f"{versions()} has no launcher for machine code: adapt kernels/runtime/private.py"
    )


def test_nodes_of_an_autograd_graph() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x + x

        @staticmethod
        def backward(ctx, gradient):
            return gradient + gradient

    x = torch.ones(3, requires_grad=True)
    y, z = Double.apply(x), x * x
    assert private.is_python_backward(y.grad_fn), f"{versions()} hides its Python functions"
    assert not private.is_python_backward(z.grad_fn)
    for node in (y.grad_fn, z.grad_fn):
        assert private.get_gradient_types(node) == [(x.shape, x.dtype, x.device)]
    assert torch.equal(y.grad_fn.apply(torch.ones(3)), torch.full((3,), 2.0))
    assert torch.equal(sum(z.grad_fn(torch.ones(3))).detach(), torch.full((3,), 2.0))


@pytest.mark.gpu
def test_machine_code_is_launched_again() -> None:
    from linsight.kernels.scaled_add import scaled_add
    from linsight.kernels.scaled_add.plan import plan

    x = torch.randn(3, 5, 8, device="cuda")
    first, second = (scaled_add(x, x, x[0, 0]) for _ in range(2))
    torch.testing.assert_close(first, x + x[0, 0] * x)
    assert torch.equal(first, second)
    code = plan(x.shape, x.device).forward.code
    assert code
    assert None not in code.values(), f"{versions()} gives no machine code back"
