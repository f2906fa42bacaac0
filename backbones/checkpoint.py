"""What everything that loads weights shares."""

import math
import re
from collections.abc import Mapping
from typing import Any

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

# Training scripts wrap the weights with their optimiser and arguments; timm's order of choice.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
SHOWN = 3


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, does not fit, or cannot be written."""


def unwrap(checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The state dict inside a training checkpoint, its averaged weights first, or itself."""
    for key in WRAPPERS:
        if isinstance(checkpoint.get(key), Mapping):
            return checkpoint[key]
    return checkpoint


def renamed(name: str, names: Mapping[str, str]) -> str:
    """A weight's name with each part that is a key of `names` replaced, the first key first."""
    keys = "|".join(map(re.escape, names))
    return re.sub(keys, lambda found: names[found[0]], name)


def resize_position(position: Tensor, size: tuple[int, int], prefix_tokens: int) -> Tensor:
    """A position embedding (1, P + G * G, C) of a square map, bicubically resized to (H, W).

    One that has this size already, or is of no square map, is returned as it is.
    """
    tokens = position.shape[1] - prefix_tokens
    if tokens == size[0] * size[1] or math.isqrt(max(tokens, 0)) ** 2 != tokens:
        return position
    return resample_abs_pos_embed(position, size, num_prefix_tokens=prefix_tokens)


def check_fit(
    state_dict: Mapping[str, Tensor],
    model: nn.Module,
    message: str,
    ignore: tuple[str, ...] = (),
) -> None:
    """Refuse weights that are not this model's.

    Args:
        state_dict: the weights.
        model: where they are to go.
        message: what to say of weights that do not fit; how they differ follows.
        ignore: prefixes of the weights that may be missing, left over or of another shape.

    Raises:
        CheckpointError: a weight is missing, left over, or of another shape.
    """
    own, got = (
        {
            key: tuple(value.shape)
            for key, value in weights.items()
            # Weights from before torch counted batches have no counter.
            if not key.startswith(ignore) and not key.endswith("num_batches_tracked")
        }
        for weights in (model.state_dict(), state_dict)
    )
    faults = []
    for fault, keys in (
        ("missing", [key for key in own if key not in got]),
        ("unexpected", [key for key in got if key not in own]),
    ):
        if keys:
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            faults.append(f"{len(keys)} weights {fault} ({', '.join(keys[:SHOWN])}{more})")
    reshaped = [key for key in own if got.get(key, own[key]) != own[key]]
    faults += [f"{key} is {got[key]}, the model's {own[key]}" for key in reshaped[:SHOWN]]
    if len(reshaped) > SHOWN:
        faults.append(f"and {len(reshaped) - SHOWN} more of another shape")
    if faults:
        raise CheckpointError(f"{message}: {'; '.join(faults)}")


def check_model(state_dict: Mapping[str, Tensor], model: nn.Module) -> None:
    """`check_fit` for a model of timm, which adapts the classifier and the first convolution.

    Raises:
        CheckpointError: see `check_fit`.
    """
    config = model.pretrained_cfg
    check_fit(
        state_dict,
        model,
        f"the checkpoint is not of {config['architecture']}",
        ignore=(f"{config['classifier']}.", f"{config['first_conv']}."),
    )
