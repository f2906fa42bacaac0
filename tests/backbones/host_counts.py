"""What a training step asks of the host, counted without a GPU: `python host_counts.py MODEL`.

The step runs on the CPU with the kernels chosen as on a GPU, and with every launch of a Triton
kernel counted and left out. Its outputs are therefore meaningless; its counts agree with a GPU's,
but for the operators that PyTorch composes differently there.
"""

import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import timm
import torch
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile
from triton.runtime.jit import KernelInterface

import linsight  # noqa: F401
from linsight.kernels import force

# Neither the number of images nor their width changes a count, and both cost time.
BATCH, SIDE = 1, 224
NARROW = {
    "rala_vit_small": {"embed_dim": (16, 32, 80, 128)},
    "softmax_swin_tiny": {"embed_dim": 24},
}


@contextmanager
def count_launches() -> Iterator[list[str]]:
    """The names of the Triton kernels that would be launched; none is launched."""
    names: list[str] = []
    original = KernelInterface.__getitem__

    def get(kernel, grid) -> Callable:
        names.append(kernel.fn.__name__)
        return ignore

    def ignore(*args, **options) -> None: ...

    KernelInterface.__getitem__ = get
    try:
        yield names
    finally:
        KernelInterface.__getitem__ = original


@contextmanager
def count_calls() -> Iterator[list[int]]:
    """The number of Python functions that are called."""
    calls = [0]

    def watch(frame, event, argument) -> None:
        if event == "call":
            calls[0] += 1

    gc.disable()  # A finaliser would count as a call.
    sys.setprofile(watch)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        gc.enable()


def runs_a_kernel(operator: str) -> bool:
    """Whether an operator of PyTorch, by its name, may launch a kernel; views do not.

    Ask this of operators that call no other one: an operator that only calls others launches none.
    """
    if operator.startswith(("empty", "new_empty", "_local_scalar")):
        return False
    packet = getattr(torch.ops.aten, operator)
    schema = getattr(packet, packet.overloads()[0])._schema
    name = schema.name + (f".{schema.overload_name}" if schema.overload_name else "")
    if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"):
        return False
    returned = [value.alias_info for value in schema.returns]
    return not any(alias is not None and not alias.is_write for alias in returned)


def count_kernels(event: FunctionEvent) -> int:
    """The least number of kernels that an operator of PyTorch and those that it calls launch."""
    inner = sum(count_kernels(child) for child in event.cpu_children)
    operator = event.name.removeprefix("aten::")
    return inner or int(operator != event.name and runs_a_kernel(operator))


def count_nodes(y: Tensor) -> int:
    """The number of nodes of the autograd graph."""
    seen, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return len(seen)


def count(name: str) -> dict[str, int]:
    """Launches, Python-level calls and autograd nodes of a training step in bfloat16 autocast."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = timm.create_model(name, **NARROW[name]).train()
    x = torch.randn(BATCH, 3, SIDE, SIDE)

    def forward() -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float().square().mean()

    with force("triton"), count_launches() as launched:
        y = forward()  # The first step makes plans and constant tensors, which later steps find.
        nodes = count_nodes(y)
        y.backward()
        launched.clear()
        with profile(activities=[ProfilerActivity.CPU]) as profiler, count_calls() as calls:
            forward().backward()
    events = [event for event in profiler.events() if event.cpu_parent is None]
    return {
        "launches of Triton kernels": len(launched),
        "launches of PyTorch's operators": sum(count_kernels(event) for event in events),
        "Python-level calls": calls[0],
        "autograd nodes": nodes,
    }


if __name__ == "__main__":
    print(json.dumps(count(sys.argv[1])))
