"""Models in half precision, in which the layers that overflow compute in float32."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from linsight.backbones.checkpoint import CheckpointError
from linsight.tools.export_subject import Subject


def lower(
    subject: Subject, dtype: torch.dtype, batches: Sequence[Tensor]
) -> tuple[Subject, tuple[str, ...]]:
    """A copy of a model in half precision, and the names of its modules that stay in float32.

    Where a layer overflows on the batches, it computes in float32; where the result is beyond the
    largest number of the dtype, so does the module that holds the layer, and so on.

    Args:
        subject: the model, in float32.
        dtype: float16 or bfloat16.
        batches: images (B, C, H, W), uint8.

    Raises:
        CheckpointError: only the whole model in float32 would not overflow. The error names the
            layer. Or the model computes coordinates, as DINO does, or an operator lacks the dtype.
    """
    if not getattr(subject.module, "takes_half", True):
        raise CheckpointError("DINO computes with coordinates, which need --dtype float32")
    # What is infinite in float32 too, such as a mask for a softmax, is meant to be.
    meant = set(_overflows(subject.module, batches))
    module = copy.deepcopy(subject.module).to(dtype)
    wide: dict[str, str] = {}  # from a module to the layer that overflows in it
    while names := [name for name in _try(module, batches, dtype) if name not in meant]:
        layer = name = names[0]
        while name in wide or isinstance(module.get_submodule(name), nn.ModuleList | nn.ModuleDict):
            name = name.rpartition(".")[0]
        for inner in [inner for inner in wide if inner.startswith(f"{name}.")]:
            del module.get_submodule(inner).forward
            layer = wide.pop(inner)
        if "." not in name:
            raise CheckpointError(
                f"{layer} overflows {str(dtype).removeprefix('torch.')}, whose largest number is "
                f"{torch.finfo(dtype).max:.3g}, and so does what follows; export with --dtype "
                "bfloat16 or float32"
            )
        _widen(module.get_submodule(name), subject.module.get_submodule(name), dtype)
        wide[name] = layer
    return replace(subject, module=module), tuple(wide)


def _try(module: nn.Module, batches: Sequence[Tensor], dtype: torch.dtype) -> list[str]:
    try:
        return _overflows(module, batches)
    except RuntimeError as error:  # an operator
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(f"the model does not run in {dtype}: {reason}") from error


def _widen(part: nn.Module, original: nn.Module, dtype: torch.dtype) -> None:
    """Let a module compute in float32, of inputs and with results in another dtype.

    Args:
        part: the module.
        original: the same module with its weights in float32.
        dtype: of the inputs and results.
    """
    for mine, whole in zip(_tensors(part), _tensors(original), strict=True):
        mine.data = whole.data.clone()
    forward = part.forward

    def compute(*args: Any, **options: Any) -> Any:
        args, options = tree_map(lambda x: _cast(x, dtype, torch.float32), (args, options))
        return tree_map(lambda x: _cast(x, torch.float32, dtype), forward(*args, **options))

    part.forward = compute


def _tensors(part: nn.Module) -> Iterator[Tensor]:
    yield from part.parameters()
    yield from part.buffers()


def _cast(x: Any, source: torch.dtype, target: torch.dtype) -> Any:
    return x.to(target) if isinstance(x, Tensor) and x.dtype == source else x


@torch.inference_mode()
def _overflows(module: nn.Module, batches: Sequence[Tensor]) -> list[str]:
    """Names of the modules that make infinity or NaN of finite inputs, the first one first."""
    found: dict[str, None] = {}
    with _hooks(module, found):
        for images in batches:
            module(images)
    return list(found)


@contextmanager
def _hooks(module: nn.Module, found: dict[str, None]) -> Iterator[None]:
    def watch(name: str) -> Any:
        def look(part: nn.Module, args: Any, options: Any, result: Any) -> None:
            if not _finite(result) and _finite((args, options)):
                found[name] = None

        return look

    handles = [
        part.register_forward_hook(watch(name), with_kwargs=True)
        for name, part in module.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(values: Any) -> bool:
    return all(
        bool(x.isfinite().all())
        for x in tree_leaves(values)
        if isinstance(x, Tensor) and x.is_floating_point()
    )
