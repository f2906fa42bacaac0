"""A pass of a model on tensors that have shapes but no storage: what would it launch?

Everything is decided as in the pass itself, down to the autograd graph; only PyTorch's operators
compute shapes alone, and launches of kernels are collected (`collect_variants`). No GPU is needed.
"""

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .compilation import expect_pass
from .private import get_gradient_types, is_intercepted, is_python_backward, make_fake_mode


@dataclass(frozen=True)
class Pass:
    """How a model is called.

    Args:
        shape, dtype: of the images.
        training: whether the model is in training mode.
        gradient: whether a gradient is recorded, so that a backward pass follows.
        autocast: the dtype of autocast, or None without it.
        device: of images and model: a CUDA device, which need not be there.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    training: bool
    gradient: bool
    autocast: torch.dtype | None
    device: torch.device


def change_resolution(how: Pass) -> Pass:
    """The pass of one image of another resolution.

    What depends on the resolution is whether maps are padded, and whether an image alone fills the
    GPU. Compiled with the rest, it keeps no later resolution waiting.
    """
    _, channels, height, width = how.shape
    return replace(how, shape=(1, channels, height + 32, width + 32))


def rehearse(
    model: nn.Module, how: Pass, within: AbstractContextManager[Any] | None = None
) -> None:
    """Compute a pass of `model`, forward and backward, without its numbers.

    The model itself is left as it is: it may be on any device, and its hooks are not called.

    Args:
        model, how: what is computed.
        within: a context around the pass.
    """
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(how.gradient),
        _autocast(how.autocast),
        make_fake_mode(),
        within or nullcontext(),
    ):
        shadow = _make_shadow(model, how.device, {}).train(how.training)
        y = shadow(torch.empty(how.shape, dtype=how.dtype, device=how.device))
        if isinstance(y, Tensor) and y.grad_fn is not None:
            with _autocast(None):
                _run_backward(y, torch.empty_like(y))


def _make_shadow(module: nn.Module, device: torch.device, copies: dict[int, Any]) -> nn.Module:
    """A copy of `module` without hooks, with tensors of the mode, and all else shared."""
    if id(module) in copies:
        return copies[id(module)]

    def copy(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        if id(x) not in copies:
            fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
            copies[id(x)] = (
                nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake
            )
        return copies[id(x)]

    is_shared = isinstance(module, nn.SyncBatchNorm)
    shadow: Any = object.__new__(_LocalBatchNorm if is_shared else type(module))
    copies[id(module)] = shadow
    hooks = {k: type(v)() for k, v in vars(module).items() if k.endswith("_hooks")}
    shadow.__dict__.update(vars(module), **hooks)
    shadow._parameters = {k: copy(v) for k, v in module._parameters.items()}
    shadow._buffers = {k: copy(v) for k, v in module._buffers.items()}
    shadow._modules = {
        k: None if v is None else _make_shadow(v, device, copies)
        for k, v in module._modules.items()
    }
    return shadow


class _LocalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """PyTorch's layer for several processes without its questions to the others, who do not answer.

    What it launches is not ours to compile.
    """

    def _check_input_dim(self, input: Tensor) -> None: ...


@contextmanager
def _autocast(dtype: torch.dtype | None) -> Iterator[None]:
    # `torch.autocast` itself refuses where there is no GPU.
    kind = "cuda"
    enabled, previous = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_enabled(kind, dtype is not None)
    torch.set_autocast_dtype(kind, previous if dtype is None else dtype)
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, previous)
        torch.set_autocast_cache_enabled(cached)


def _run_backward(y: Tensor, gradient: Tensor) -> None:
    """The backward pass from `y` and its gradient, node by node, without anyone's hooks.

    PyTorch's own engine asks for the GPU, and would call the hooks of whoever watches gradients.
    """
    last: Any = y.grad_fn
    waiting: dict[Any, int] = {last: 0}
    stack = [last]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None and node not in waiting:
                stack.append(node)
                waiting[node] = 0
            if node is not None:
                waiting[node] += 1
    gradients: dict[Any, dict[int, Tensor]] = {last: {y.output_nr: gradient}}
    ready = [last]
    while ready:
        node = ready.pop()
        given = _differentiate(node, gradients.pop(node, {}))
        for (following, index), found in zip(node.next_functions, given, strict=False):
            if following is None:
                continue
            if found is not None:
                _add(gradients.setdefault(following, {}), index, found, following)
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)


def _differentiate(node: Any, given: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients that a node gives for those that it was given, by their index."""
    nothing = (None,) * len(node.next_functions)
    if not given or not node.next_functions:
        return nothing
    types = get_gradient_types(node)
    with torch.no_grad():
        if is_python_backward(node):
            all_given = [
                given[i] if i in given else torch.zeros(shape, dtype=dtype, device=device)
                for i, (shape, dtype, device) in enumerate(types)
            ]
            result = node.apply(*all_given)
        else:
            result = node(*(given.get(i) for i in range(len(types))))
    return result if isinstance(result, tuple) else (result,)


def _add(sums: dict[int, Tensor], index: int, gradient: Tensor, node: Any) -> None:
    """Add a gradient, in the shape and dtype that the node wants, as PyTorch's engine does."""
    if node.next_functions:  # A leaf of the graph takes what it is given.
        shape, dtype, _ = get_gradient_types(node)[index]
        if gradient.shape != shape:
            gradient = gradient.sum_to_size(shape)
        gradient = gradient.to(dtype)
    sums[index] = sums[index] + gradient if index in sums else gradient


_announced: weakref.WeakKeyDictionary[nn.Module, set[tuple]] = weakref.WeakKeyDictionary()


def announce_pass(model: nn.Module, x: Tensor) -> None:
    """Tell that a model's pass on images `x` begins, so that its kernels are compiled together.

    It does something at the first eager pass on a GPU in each mode and dtype.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cuda:
        return
    autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    key = (model.training, torch.is_grad_enabled(), autocast, x.dtype)
    known = _announced.setdefault(model, set())
    if key in known or is_intercepted():
        return
    known.add(key)
    training, gradient, autocast, dtype = key
    how = Pass(tuple(x.shape), dtype, training, gradient, autocast, x.device)
    reference = weakref.ref(model)

    def rehearse_model() -> None:
        model = reference()
        if model is not None:
            rehearse(model, how)
            rehearse(model, change_resolution(how))

    expect_pass(rehearse_model)
