"""Linear layers whose weights are constants."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import is_
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy

from ..kernels.linear import linear
from ..kernels.runtime.dispatch import PLAIN_TENSORS, TRITON_DTYPES, is_direct_call
from ..kernels.runtime.private import get_stream
from .tracing import record_call

# The streams, devices and dtypes for which the converted weights of a list of blocks are kept.
MOST_COPIES = 4


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


class _Copies(NamedTuple):
    """Weights and biases in another dtype.

    Attributes:
        parameters: all of the layers.
        kinds: their dtypes, devices and shapes.
        sources: those that are converted.
        targets: memory for their copies.
        weights: the copies of each layer, by its identity.
    """

    parameters: list[Tensor]
    kinds: list[tuple[torch.dtype, int, torch.Size]]
    sources: list[Tensor]
    targets: list[Tensor]
    weights: dict[int, tuple[Tensor, Tensor | None]]


# Of lists of blocks: their layers of the class `Linear`, and copies by dtype, device and stream.
_layers: WeakKeyDictionary[nn.Module, list[Linear]] = WeakKeyDictionary()
_copies: WeakKeyDictionary[nn.Module, OrderedDict[tuple, _Copies]] = WeakKeyDictionary()


def convert_weights(blocks: nn.Module, x: Tensor) -> AbstractContextManager:
    """A context in which autocast finds the folded layers of blocks converted, in inference.

    Autocast converts the weight and the bias of each layer by a kernel for each, at each call, as
    it keeps them in training alone. Here a few kernels convert all of them, anew for each pass: the
    parameters may have changed. The copies stay allocated, for each stream, on which one pass comes
    after the other.

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
        # A graph would read memory that may be given back while it can still be replayed.
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return nullcontext()
    layers = _layers.get(blocks)
    if layers is None:
        layers = _layers[blocks] = [part for part in blocks.modules() if type(part) is Linear]
    return _hold(_convert(blocks, layers, x)) if layers else nullcontext()


def _casts_to(dtype: torch.dtype, kind: str) -> bool:
    """Whether autocast converts to a dtype here: a part of a pass may run otherwise."""
    return (
        torch.is_autocast_enabled(kind)
        and torch.get_autocast_dtype(kind) == dtype
        and not torch.is_grad_enabled()
    )


@contextmanager
def _hold(weights: dict[int, tuple[Tensor, Tensor | None]]) -> Iterator[None]:
    outer, _pass.weights = _pass.weights, weights
    try:
        yield
    finally:
        _pass.weights = outer


def _convert(
    blocks: nn.Module, layers: list[Linear], x: Tensor
) -> dict[int, tuple[Tensor, Tensor | None]]:
    dtype = torch.get_autocast_dtype(x.device.type)
    key = dtype, x.device, get_stream(x.get_device()) if x.is_cuda else 0
    held = _copies.setdefault(blocks, OrderedDict())
    found = held.get(key)
    parameters: list[Tensor] = [
        p for layer in layers for p in layer._parameters.values() if p is not None
    ]
    kinds = [(p.dtype, p.get_device(), p.shape) for p in parameters]
    if (
        found is None
        or len(parameters) != len(found.parameters)
        or not all(map(is_, parameters, found.parameters))
        or kinds != found.kinds
    ):
        found = held[key] = _allocate(layers, parameters, kinds, dtype, x.device)
        if len(held) > MOST_COPIES:
            held.popitem(last=False)
    held.move_to_end(key)
    if found.sources:
        torch._foreach_copy_(found.targets, found.sources)
    return found.weights


def _allocate(
    layers: list[Linear],
    parameters: list[Tensor],
    kinds: list[tuple[torch.dtype, int, torch.Size]],
    dtype: torch.dtype,
    device: torch.device,
) -> _Copies:
    sources, targets, weights = [], [], {}
    # Memory made in inference mode could not be written to outside of it.
    with torch.inference_mode(False):
        for layer in layers:
            own = [layer._parameters.get(name) for name in ("weight", "bias")]
            if own[0] is None or not all(p is None or _is_cast(p, dtype, device) for p in own):
                continue
            made = [None if p is None else torch.empty_like(p, dtype=dtype) for p in own]
            weights[id(layer)] = tuple(made)
            sources += [p for p in own if p is not None]
            targets += [p for p in made if p is not None]
    return _Copies(parameters, kinds, sources, targets, weights)


def _is_cast(p: Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether autocast would convert a parameter of a layer whose input is on a device."""
    return (
        type(p) in PLAIN_TENSORS
        and p.device == device
        and p.dtype != dtype
        and p.dtype in TRITON_DTYPES
    )
