"""Token mixers: one attention mechanism a file, any of which any skeleton can hold."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from .agent import Agent
from .cross_window import CrossWindow
from .magnitude_aware import MagnitudeAware
from .place import Place
from .rank_augmented import RankAugmented
from .softmax import GatedSoftmax, Softmax
from .softmax_free import SoftmaxFree
from .spatial_reduction import SpatialReduction
from .window import Window

MIXERS: dict[str, type[nn.Module]] = {
    "agent": Agent,
    "cross_window": CrossWindow,
    "gated_softmax": GatedSoftmax,
    "mala": MagnitudeAware,
    "rala": RankAugmented,
    "softmax": Softmax,
    "softmax_free": SoftmaxFree,
    "spatial_reduction": SpatialReduction,
    "window": Window,
}

# One mixer; one a stage; or, within a stage, one a block.
MixerNames = str | Sequence[str | Sequence[str]]
# By mixer: its keyword arguments, a tuple or list with one entry a stage.
MixerOptions = Mapping[str, Mapping[str, Any]]


def mixers_by_block(mixer: MixerNames, depths: Sequence[int]) -> list[list[str]]:
    """The name of every block's mixer, stage by stage.

    Raises:
        ValueError: if there are not as many names as stages, or as blocks in a stage.
    """
    stages = [mixer] * len(depths) if isinstance(mixer, str) else list(mixer)
    if len(stages) != len(depths):
        raise ValueError(f"mixer names {len(stages)} stages, the model has {len(depths)}")
    blocks = [
        [names] * depth if isinstance(names, str) else list(names)
        for names, depth in zip(stages, depths, strict=True)
    ]
    for i, (names, depth) in enumerate(zip(blocks, depths, strict=True)):
        if len(names) != depth:
            raise ValueError(f"mixer names {len(names)} blocks of stage {i}, which has {depth}")
    return blocks


def build_mixer(name: str, place: Place, options: MixerOptions | None = None) -> nn.Module:
    """The mixer called `name`, for `place`.

    Args:
        name: a key of `MIXERS`.
        place: where it is to stand.
        options: keyword arguments by mixer, of which those of `name` are used; a tuple or list
            has one entry a stage.

    Raises:
        ValueError: if there is no such mixer (the message has the nearest names), or if it
            cannot stand there.
    """
    if name not in MIXERS:
        near = get_close_matches(name, MIXERS) or sorted(MIXERS)
        raise ValueError(f"there is no mixer {name!r}; did you mean {', '.join(near)}?")
    chosen = {
        option: value[place.stage] if isinstance(value, (tuple, list)) else value
        for option, value in (options or {}).get(name, {}).items()
    }
    return MIXERS[name](place, **chosen)


def fit_tables(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights with the mixers' learned tables as `model` has them; what is no table stays.

    A mixer whose authors keep its tables under other names or in other shapes, or whose tables
    depend on the size of the images, has a function `fit_tables(state_dict, shapes)`, with the
    shapes of all the model's weights.
    """
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    for mixer in MIXERS.values():
        if hasattr(mixer, "fit_tables"):
            state_dict = mixer.fit_tables(state_dict, shapes)
    return dict(state_dict)
