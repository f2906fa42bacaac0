"""How an `act_layer` is named, and which activations the kernels know."""

from collections.abc import Callable
from typing import Any

from timm.layers import get_act_layer
from torch import nn

from ..kernels.runtime.activation import Activation

# A class, a partial of one, or one of timm's names; called without arguments.
ActLayer = str | Callable[..., nn.Module]


def resolve_act_layer(act_layer: ActLayer | None, default: Any) -> Callable[..., nn.Module]:
    """The callable that makes an activation module; None stands for the default.

    Raises:
        ValueError: if timm knows no activation of that name.
    """
    if act_layer is None:
        return default
    if not isinstance(act_layer, str):
        return act_layer
    try:
        found = get_act_layer(act_layer)
    except KeyError:
        found = None
    if found is None:
        raise ValueError(
            f"act_layer is {act_layer!r}, which timm does not know: give a name such as 'relu' "
            "or 'silu', a class or a partial"
        )
    return found


def kernel_activation(activation: nn.Module | None) -> Activation | None:
    """The name by which the kernels know an activation module, or None if they do not know it."""
    if type(activation) is nn.ReLU:
        return "relu"
    # timm's names give functional GELU as a class of its own.
    if type(activation).__name__ == "GELU" and getattr(activation, "approximate", "none") == "none":
        return "gelu"
    return None
