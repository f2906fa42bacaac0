"""The contract of a token mixer, and the names under which mixers are found."""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from inspect import signature
from typing import Any, TypeVar

from timm.models import register_notrace_module
from torch import Tensor, nn

from ..context import Context, Place
from ..initialization import init_convolutions, init_linear_layers


class TokenMixer(nn.Module):
    """One attention mechanism: built as `mixer(place, **options)`, called as `mixer(x, context)`.

    It initialises its own weights, names those of its own parameters that weight decay leaves
    out, and converts its own entries of a checkpoint. `convert_checkpoint` sees them alone, under
    the names that they have within the mixer.
    """

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Mix the tokens (B, P + H * W, C) of a map of `context.size`, to the same shape."""
        raise NotImplementedError

    def init_weights(self, place: Place) -> None:
        """Initialise the weights; linear layers get a truncated normal distribution."""
        init_linear_layers(self, place.init_std)
        if place.fan_out:
            init_convolutions(self)

    def no_weight_decay(self) -> set[str]:
        """Names within this mixer of parameters, beyond vectors, that weight decay leaves out."""
        return set()

    def absorb_norm(self, norm: nn.Module) -> nn.Module:
        """Fold the norm of this mixer's input, which is constant in evaluation, into its layers.

        Args:
            norm: the norm; see `linsight.backbones.norms.fold_into_linear`.

        Returns:
            What takes the norm's place: the norm itself, where more than linear layers read it.
        """
        return norm

    def convert_checkpoint(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's entries of this mixer, under this class's names and in its shapes.

        Args:
            entries: the authors' entries, or this library's, which pass through.
        """
        return entries

    def resize_tables(self, size: tuple[int, int]) -> dict[str, Tensor]:
        """The learned tables that depend on the model's image size, interpolated for another one.

        Args:
            size: (H, W) of the map at the new image size.

        Returns:
            New values of parameters, by their names within this mixer.

        Raises:
            ValueError: if a layer depends on the image size otherwise.
        """
        return {}


MixerClass = TypeVar("MixerClass", bound=type[TokenMixer])
MIXERS: dict[str, type[TokenMixer]] = {}

# One mixer for all depths; one per stage; within a stage, one per depth; or an `Alternate`.
MixerNames = str | Sequence[str | Sequence[str]]
# Keyword arguments by mixer; a tuple or list has one entry per stage.
MixerOptions = Mapping[str, Mapping[str, Any]]


def register_mixer(name: str) -> Callable[[MixerClass], MixerClass]:
    """Register the decorated class under `name`, and as a leaf for torch.fx.

    Raises:
        ValueError: if the name is taken.
    """

    def register(mixer: MixerClass) -> MixerClass:
        if name in MIXERS:
            raise ValueError(f"there are two mixers {name!r}: {MIXERS[name]} and {mixer}")
        MIXERS[name] = mixer
        register_notrace_module(mixer)
        return mixer

    return register


def build_mixer(name: str, place: Place, options: MixerOptions | None = None) -> TokenMixer:
    """The mixer called `name`, for `place`.

    Args:
        name: a key of `MIXERS`.
        place: where the mixer is to stand.
        options: keyword arguments by mixer, of which those of `name` are used; a tuple or list
            has one entry per stage.

    Raises:
        ValueError: if there is no such mixer (the message has the nearest names), if it cannot
            stand there, or if it has no such option.
    """
    if name not in MIXERS:
        near = get_close_matches(name, MIXERS) or sorted(MIXERS)
        raise ValueError(f"there is no mixer {name!r}; did you mean {', '.join(near)}?")
    if unknown := sorted(set(options or {}) - set(MIXERS)):
        near = get_close_matches(unknown[0], MIXERS) or sorted(MIXERS)
        raise ValueError(
            f"mixer_options has {unknown[0]!r}, which is no mixer; did you mean {', '.join(near)}?"
        )
    chosen = {
        option: value[place.stage] if isinstance(value, (tuple, list)) else value
        for option, value in (options or {}).get(name, {}).items()
    }
    known = list(signature(MIXERS[name]).parameters)[1:]
    if wrong := [option for option in chosen if option not in known]:
        raise ValueError(
            f"mixer_options.{name} has {wrong[0]!r}, expected some of {', '.join(known) or 'none'}"
        )
    mixer = MIXERS[name](place, **chosen)
    mixer.init_weights(place)
    return mixer


def refuse_prefix_tokens(place: Place, reason: str) -> None:
    """Raise ValueError for a place with class tokens, where a mixer needs a map alone."""
    if place.prefix_tokens:
        raise ValueError(
            f"{place.prefix_tokens} class tokens stand before the map, but {reason}: take another "
            "mixer for this stage, or a skeleton without class tokens"
        )
