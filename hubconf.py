"""Entry points of `torch.hub`: the models of the zoo by their names, without an installation.

::

    model = torch.hub.load("linsight/linsight", "rala_vit_small", pretrained=True)
    names = torch.hub.list("linsight/linsight")
"""

import sys
from collections.abc import Callable as _Callable
from importlib.util import module_from_spec as _module_from_spec
from importlib.util import spec_from_file_location as _spec_from_file_location
from pathlib import Path as _Path

import timm
from torch import nn

dependencies = ["torch", "timm", "safetensors", "huggingface_hub"]


def _import_linsight() -> None:
    """Import linsight from this checkout, whose folders an installation puts into the package."""
    root = _Path(__file__).resolve().parent
    spec = _spec_from_file_location(
        "linsight",
        root / "linsight" / "__init__.py",
        submodule_search_locations=[str(root / "linsight"), str(root)],
    )
    sys.modules["linsight"] = module = _module_from_spec(spec)
    spec.loader.exec_module(module)


def _entry(name: str) -> _Callable[..., nn.Module]:
    def create(pretrained: bool = False, **arguments: object) -> nn.Module:
        return timm.create_model(name, pretrained=pretrained, **arguments)

    create.__name__ = name
    create.__doc__ = f"``timm.create_model({name!r}, pretrained, **arguments)``."
    return create


if "linsight" not in sys.modules:
    _import_linsight()

from linsight.backbones import ZOO as _ZOO  # noqa: E402

globals().update({name: _entry(name) for name in _ZOO})
