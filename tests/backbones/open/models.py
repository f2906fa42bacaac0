"""Models are open: what acts on modules (hooks, adapters, counters, ...) reaches all of them.

Each test of this folder uses the package that a user would use. A model that computes past its own
modules passes none of them, because such packages skip what is not called without saying so. This
module has the models that the tests share, and what a model consists of.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from linsight.backbones import ZOO
from linsight.backbones.layers import BatchNormAct2d
from linsight.backbones.skeletons.cswin import CSwinTransformer
from linsight.backbones.skeletons.pvt import PyramidVisionTransformer
from linsight.kernels.runtime.activation import activate
from linsight.tools.models import read_counts

from ..conftest import lively

SIDE = 64


def smallest_of_each(kind: Callable[[str], Any]) -> list[str]:
    """The smallest model of each kind of models, a kind being what the function gives of a name."""
    parameters = {name: counts[0] for name, counts in read_counts().items()}
    names: dict[Any, str] = {}
    for name in sorted(ZOO, key=parameters.__getitem__):
        names.setdefault(kind(name), name)
    return sorted(names.values())


def smallest_with_each_part() -> list[str]:
    """Models of which at least one has each skeleton and each mixer."""
    names, seen = [], set()
    for name in FAMILIES:
        parts = {ZOO[name].family.skeleton, *mixers_of(name)}
        if not parts <= seen:
            names.append(name)
            seen |= parts
    return names


def mixers_of(name: str) -> tuple[str, ...]:
    """The names of the mixers of a model's stages."""
    mixer = (ZOO[name].family.config | ZOO[name].config)["mixer"]
    return (mixer,) if isinstance(mixer, str) else tuple(mixer)


FAMILIES = smallest_of_each(lambda name: id(ZOO[name].family))
SKELETONS = smallest_of_each(lambda name: ZOO[name].family.skeleton)
PARTS = smallest_with_each_part()


def quick(names: list[str], chosen: list[str]) -> list:
    """Names as parameters of a test, those slow that are not among the chosen."""
    return [n if n in chosen else pytest.param(n, marks=pytest.mark.slow) for n in names]


def few_blocks(name: str) -> dict[str, Any]:
    """The arguments that leave a model few blocks, two of them in a stage with shifted windows."""
    config = ZOO[name].family.config | ZOO[name].config
    mixer = config.get("mixer", "")
    if "depths" in config:
        return cut(mixer, (2, 1, 1, 1))
    if not isinstance(mixer, str) and any(not isinstance(names, str) for names in mixer):
        return {}  # Its mixers are listed per block.
    return {"depth": 2}


def cut(mixer: Any, depths: tuple[int, ...]) -> dict[str, tuple]:
    """The arguments that leave a model the first blocks of each stage, and these their mixers."""
    per_block = not isinstance(mixer, str) and any(not isinstance(names, str) for names in mixer)
    mixers = [
        names if isinstance(names, str) else names[:depth]
        for names, depth in zip(mixer, depths, strict=False)
    ]
    return {"depths": depths} | ({"mixer": tuple(mixers)} if per_block else {})


def two_blocks(name: str, between: int = 0) -> dict[str, Any]:
    """The arguments that leave a model a block of each mixer, for what takes long per layer.

    Args:
        name: of the model.
        between: the number of blocks in each stage between the first and the last one.
    """
    config = ZOO[name].family.config | ZOO[name].config
    if "depths" not in config:
        return {"depth": 1}
    mixer = config["mixer"]
    # The blocks of a stage with several mixers take turns.
    first, last = (
        1 if isinstance(mixer, str) or isinstance(mixer[stage], str) else len(set(mixer[stage]))
        for stage in (0, -1)
    )
    return cut(mixer, (first, between, between, last))


def few_channels(name: str) -> dict[str, tuple[int, ...]]:
    """The arguments that make a model with stages narrow, with as many channels per head."""
    skeleton = ZOO[name].family.skeleton
    if "depths" not in ZOO[name].family.config | ZOO[name].config:
        return {}
    # CSWin divides the heads between two directions.
    heads = (2, 4, 6, 8) if skeleton is CSwinTransformer else (1, 2, 3, 4)
    channels = 64 if skeleton is PyramidVisionTransformer else 32
    return {"embed_dim": tuple(channels * number for number in heads), "num_heads": heads}


def create(name: str, **arguments) -> nn.Module:
    """A model of few blocks and channels."""
    small = {"num_classes": 10, "img_size": SIDE} | few_blocks(name) | few_channels(name)
    return timm.create_model(name, **small | arguments)


def little(name: str, **arguments) -> nn.Module:
    """A small model in evaluation mode, in float64 so that comparisons are sharp."""
    return lively(create(name, **arguments).double())


def images(batch: int = 2) -> Tensor:
    """Images that are higher than wide, so that a transposed map cannot pass."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, SIDE, SIDE // 2, dtype=torch.float64, generator=generator)


def one_image() -> Tensor:
    """An image for tests that make many passes."""
    return images(1)


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    return {name: part for name, part in model.named_modules() if not any(part.children())}


def of_type(model: nn.Module, kind: type | tuple[type, ...]) -> dict[str, nn.Module]:
    return {name: part for name, part in model.named_modules() if isinstance(part, kind)}


def put(model: nn.Module, name: str, part: nn.Module) -> None:
    """Replace the module called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, part)


def distance(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


def calls(model: nn.Module, x: Tensor) -> dict[str, int]:
    """The number of times that each leaf module's `forward` runs in one pass."""
    counts = Counter()
    handles = [
        part.register_forward_hook(lambda *_, name=name: counts.update([name]))
        for name, part in leaves(model).items()
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return {name: counts[name] for name in leaves(model)}


def not_once(model: nn.Module, x: Tensor) -> dict[str, int]:
    return {name: times for name, times in calls(model, x).items() if times != 1}


def give(other: nn.Module) -> Callable:
    """A hook that gives another module's result in the place of its module's own."""

    def hook(part: nn.Module, args: tuple, output: Tensor | tuple[Tensor, Tensor]) -> Any:
        # A norm of the model's own class may give a residual sum, and that sum normalised.
        if isinstance(output, tuple):
            return output[0], other(output[0])
        # Another norm takes the place of the norm alone; the model still activates its result.
        activates = isinstance(part, BatchNormAct2d) and not isinstance(other, BatchNormAct2d)
        return activate(other(*args), part.activation) if activates else other(*args)

    return hook
