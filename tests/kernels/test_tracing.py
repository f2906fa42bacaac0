"""AOTInductor sees the launches of the operators, and can start their kernels without linsight."""

import builtins
import dis
import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._functorch.aot_autograd import aot_function
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import linsight.kernels
from linsight.kernels.linear_attention import operator
from linsight.kernels.runtime import private
from linsight.kernels.runtime.tracing import can_show_kernels

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, and interprets nothing"
)
# PyTorch's compiler writes these imports before a kernel's source.
GIVEN = {"triton", "tl", "libdevice", "tl_math"}


def all_kernels() -> Iterator[Any]:
    for found in pkgutil.walk_packages(linsight.kernels.__path__, "linsight.kernels."):
        module = importlib.import_module(found.name)
        for value in vars(module).values():
            if isinstance(value, triton.runtime.JITFunction) and value.fn.__module__ == found.name:
                yield value


def test_the_source_of_each_kernel_stands_alone():
    """TorchInductor writes kernels and what they call into one file, under their names there.

    So one name means one thing in all that a kernel reaches; no called function has another name
    where it is called; and constants are of the types that it writes.
    """
    kernels = list(all_kernels())
    assert len(kernels) > 60
    for kernel in kernels:
        meaning: dict[str, Any] = {}
        todo = [kernel]
        while todo:
            function = todo.pop().fn
            names = {i.argval for i in dis.Bytecode(function) if i.opname == "LOAD_GLOBAL"}
            for name in names - GIVEN - set(dir(builtins)):
                where = f"{name} in {function.__module__}.{function.__name__}"
                value = function.__globals__[name]
                assert meaning.setdefault(name, value) is value, f"two things are called {where}"
                if isinstance(value, triton.runtime.JITFunction):
                    assert value.fn.__name__ == name, f"{where} is defined as {value.fn.__name__}"
                    todo.append(value)
                elif not isinstance(value, (int, str, bool, triton.language.constexpr)):
                    assert not isinstance(value, ModuleType), where
                    assert value.__module__.startswith("triton"), where


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU to compile for, whose tensors are fake."""
    from triton.backends.compiler import GPUTarget

    from linsight.kernels.runtime.private import pretend_target

    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    with (
        pretend_target(GPUTarget("cuda", 90, 32)),
        FakeTensorMode(),
        torch.no_grad(),
        V.set_aot_compilation(True),
    ):
        yield


def list_calls(graph: torch.fx.GraphModule) -> list[str]:
    """The launched kernels and the operators of linsight in a graph, in their order."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    calls = []
    for node in graph.graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            # The number of warps makes an autotuner of one choice around it.
            while not isinstance(kernel, triton.runtime.JITFunction):
                kernel = kernel.fn
            calls.append(kernel.__name__)
        elif "linsight" in str(node.target):
            calls.append(str(node.target))
    return calls


def trace(function: Callable, *args: Any, **options: Any) -> list[str]:
    """The calls in the graph that a compiler gets of a call."""
    calls = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        calls.extend(list_calls(graph))
        return graph

    aot_function(function, keep, **options)(*args)
    return calls


def attend(query, key, value):
    return operator.linear_attention(
        query, key, value, None, None, None, None, "elu_plus_one", "uniform", "normalized"
    )


OPERATOR = ["linsight.linear_attention.default"]


@pytest.mark.usefixtures("fake_gpu")
def test_launches_stand_in_the_graph():
    query, key, value = (torch.empty(2, 196, 2, 32, device="cuda") for _ in range(3))
    launches = trace(attend, query, key, value)
    assert launches == ["_state", "merge", "_read"]


@pytest.mark.usefixtures("fake_gpu")
def test_a_kernel_is_looked_into_once(monkeypatch):
    from torch._higher_order_ops import triton_kernel_wrap as compiler

    monkeypatch.setattr(private, "_accesses", {})
    looks = []
    look = compiler.generate_ttir

    def count(*args):
        looks.append(args[0])
        return look(*args)

    monkeypatch.setattr(compiler, "generate_ttir", count)

    def attend_twice(query, key, value):
        return attend(attend(query, key, value)[0], key, value)

    query, key, value = (torch.empty(2, 196, 2, 32, device="cuda") for _ in range(3))
    assert len(trace(attend_twice, query, key, value)) == 6
    assert len(looks) == 3
    # Another dtype may lead another way through a kernel.
    trace(attend, query.bfloat16(), key.bfloat16(), value.bfloat16())
    assert len(looks) > 3


@pytest.mark.usefixtures("fake_gpu")
def test_the_operator_stays_where_launches_cannot_stand():
    on_the_cpu = [torch.empty(2, 196, 2, 32) for _ in range(3)]
    assert trace(attend, *on_the_cpu) == OPERATOR
    on_the_gpu = [torch.empty(2, 196, 2, 32, device="cuda") for _ in range(3)]

    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            return attend(query, key, value)[0]

    # A file of torch.export names the operator: it has no place for a kernel.
    with V.set_aot_compilation(False):
        exported = torch.export.export(Attention(), tuple(on_the_gpu))
    assert list_calls(exported.graph_module) == OPERATOR


def test_the_operator_stays_where_sizes_are_unknown():
    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes) as mode, V.set_aot_compilation(True):
        known = torch.empty(2, 196, 2, 32, device="cuda")
        unknown = mode.from_tensor(torch.empty(2, 196, 2, 32), static_shapes=False)
        assert can_show_kernels((known, None, "exp", 3))
        assert not can_show_kernels((known, unknown))
    assert not can_show_kernels((known,))  # torch.compile starts the operator.
