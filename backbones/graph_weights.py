"""The weights that autocast converts in a recorded pass, converted by a few launches in all.

Autocast converts the weight and the bias of each layer by a kernel for each, which are a quarter of
the kernels of a pass. In a recorded pass all are converted once, and a layer that is called twice
reads the same, as it does by autocast's cache.
"""

from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Key = TypeVar("Key", bound=Hashable)

_CONVERT = torch.ops.aten._to_copy.default
# Those alone, as what a subclass computes is not known.
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _find_place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class ConversionWatch(TorchDispatchMode):
    """A context that watches how a pass reads the parameters of linear layers and convolutions.

    Args:
        module: what runs.
        dtype: what autocast converts to.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        layers = [part for part in module.modules() if type(part) in _LAYERS]
        held = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
        named = [(name, p.detach()) for name, p in module.named_parameters() if id(p) in held]
        self.parameters = {_find_place(p): (name, p) for name, p in named}
        self.converted: set[int] = set()
        # Also of parameters that share their memory nothing is known.
        places = [_find_place(p) for _, p in named]
        self.read_otherwise = {place for place in places if places.count(place) > 1}

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        converts = operator is _CONVERT and kwargs.get("dtype") == self.dtype
        seen = self.converted if converts else self.read_otherwise
        seen.update(_find_place(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        return operator(*args, **kwargs)

    def find(self) -> dict[str, Tensor]:
        """The parameters, by name, that were read in no other way than to be converted."""
        places = self.converted - self.read_otherwise
        return {name: p for place, (name, p) in self.parameters.items() if place in places}


def convert(parameters: Mapping[Key, Tensor], dtype: torch.dtype) -> dict[Key, Tensor]:
    """Parameters, by name or any other key, in another dtype."""
    converted = {name: torch.empty_like(p, dtype=dtype) for name, p in parameters.items()}
    if converted:
        with torch.no_grad():
            torch._foreach_copy_(list(converted.values()), list(parameters.values()))
    return converted
