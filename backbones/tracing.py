"""How `torch.fx` traces models: what depends on the sizes of its inputs is one node of the graph.

timm's tracer is told of such modules and functions by timm's ``register_notrace_module`` and
``register_notrace_function``; PyTorch's own tracer, and torchvision's, by what is here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


def record_call(called: nn.Module | Callable, *args: Any) -> Any:
    """Record a call as one node of the graph that a tracer makes.

    A module records itself from within its ``forward``.

    Args:
        called: the module or function.
        args: its arguments, of which the first is a `Proxy`.
    """
    tracer: Any = args[0].tracer
    if isinstance(called, nn.Module):
        return tracer.create_proxy("call_module", tracer.path_of_module(called), args, {})
    return tracer.create_proxy("call_function", called, args, {})


def record_module(module: nn.Module, *args: Any) -> Any:
    """`record_call` of a module whose ``forward`` does not record itself."""
    tracer: Any = args[0].tracer
    # A tracer names a node after the module that it is in.
    return tracer.call_module(module, partial(record_call, module), args, {})
