"""Token mixers: one attention mechanism a file, any of which any skeleton can hold."""

from difflib import get_close_matches

from .magnitude_aware import MagnitudeAware
from .projected import ProjectedMixer
from .rank_augmented import RankAugmented
from .softmax import GatedSoftmax, Softmax

MIXERS: dict[str, type[ProjectedMixer]] = {
    "gated_softmax": GatedSoftmax,
    "mala": MagnitudeAware,
    "rala": RankAugmented,
    "softmax": Softmax,
}


def get_mixer(name: str) -> type[ProjectedMixer]:
    """The class of the mixer called `name`.

    Raises:
        ValueError: if there is none; the message has the nearest names.
    """
    if name not in MIXERS:
        near = get_close_matches(name, MIXERS) or sorted(MIXERS)
        raise ValueError(f"there is no mixer {name!r}; did you mean {', '.join(near)}?")
    return MIXERS[name]
