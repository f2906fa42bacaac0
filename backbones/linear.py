"""Linear layers whose weights are constants."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy

from ..kernels.linear import linear
from ..kernels.runtime.dispatch import PLAIN_TENSORS, TRITON_DTYPES, is_direct_call
from .graph_weights import convert
from .tracing import record_call


class Linear(nn.Linear):
    """A linear layer that oneDNN may compute; `fuse()` of the module around it makes it.

    Folded models alone have it, because PyTorch's `quantize_dynamic` takes layers of the class
    `nn.Linear` itself.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        if isinstance(x, Proxy):
            return record_call(self, x)
        if not is_dynamo_compiling() and _pass.weights is not None:
            found = _pass.weights.get(id(self))
            if found is not None and _casts_to(found[0].dtype, x.device.type):
                return F.linear(x, *found)
        return linear(x, self.weight, self.bias)


# As a decorator it would hide the class from type checkers.
register_notrace_module(Linear)


def is_linear(layer: nn.Module | None) -> bool:
    """Whether a layer is PyTorch's own, or `Linear`, and no class that derives from either."""
    return type(layer) in (nn.Linear, Linear)


def fuse_linear(module: nn.Module) -> None:
    """Make every linear layer within a module a `Linear`, with its parameters and its hooks."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear
    _layers.clear()


class _Pass(threading.local):
    """Of each thread the weights and biases of a pass, converted, by the identity of the layer."""

    weights: dict[int, tuple[Tensor, Tensor | None]] | None = None


_pass = _Pass()


# The layers of the class `Linear` of lists of blocks.
_layers: WeakKeyDictionary[nn.Module, list[Linear]] = WeakKeyDictionary()


def convert_weights(blocks: nn.Module, x: Tensor) -> AbstractContextManager:
    """A context in which autocast finds the folded layers of blocks converted, in inference.

    Autocast converts the weight and the bias of each layer by a kernel for each, at each call, as
    it keeps them in training alone. Here a few kernels convert all of them, anew for each pass: the
    parameters may have changed.

    Args:
        blocks: holds the layers.
        x: what the blocks are called with.
    """
    if (
        is_dynamo_compiling()
        or type(x) is not Tensor
        or torch.is_grad_enabled()
        or x.is_meta
        or not torch.is_autocast_enabled(x.device.type)
        or not is_direct_call((x,))
        or torch.jit.is_tracing()
    ):
        return nullcontext()
    layers = _layers.get(blocks)
    if layers is None:
        layers = _layers[blocks] = [part for part in blocks.modules() if type(part) is Linear]
    return _hold(_convert(layers, x)) if layers else nullcontext()


def _casts_to(dtype: torch.dtype, kind: str) -> bool:
    """Whether autocast converts to a dtype here: a part of a pass may run otherwise."""
    return (
        torch.is_autocast_enabled(kind)
        and torch.get_autocast_dtype(kind) == dtype
        and not torch.is_grad_enabled()
    )


@contextmanager
def _hold(weights: dict[int, tuple[Tensor, Tensor | None]] | None) -> Iterator[None]:
    outer, _pass.weights = _pass.weights, weights
    try:
        yield
    finally:
        _pass.weights = outer


def _convert(layers: list[Linear], x: Tensor) -> dict[int, tuple[Tensor, Tensor | None]] | None:
    """The weights and biases by the identity of their layers; None where they differ in kind, or
    autocast would not convert them."""
    parameters = {
        (id(layer), name): p
        for layer in layers
        for name, p in layer._parameters.items()
        if p is not None
    }
    kinds = {(type(p), p.dtype, p.device) for p in parameters.values()}
    if len(kinds) != 1:
        return None
    ((kind, own, device),) = kinds
    dtype = torch.get_autocast_dtype(x.device.type)
    if kind not in PLAIN_TENSORS or own not in TRITON_DTYPES or own == dtype or device != x.device:
        return None
    converted = convert(parameters, dtype)
    return {
        at: (weight, converted.get((at, "bias")))
        for (at, name), weight in converted.items()
        if name == "weight"
    }
