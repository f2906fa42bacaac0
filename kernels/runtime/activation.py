"""The activations that kernels fuse, in PyTorch."""

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

Activation = Literal["gelu", "relu"]
_CHOICES = (None, *get_args(Activation))


def check_activation(activation: str | None, name: str = "activation") -> None:
    """Raise ValueError unless the argument `name` is an `Activation` or None."""
    if activation not in _CHOICES:
        raise ValueError(f"{name} is {activation!r}, expected None, 'gelu' or 'relu'")


def activate(x: Tensor, activation: Activation | None) -> Tensor:
    """The activation of `x`: the exact GELU, ReLU or the identity."""
    return x if activation is None else getattr(F, activation)(x)
