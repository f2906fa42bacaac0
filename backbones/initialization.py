"""How weights are drawn, and how a model is made without them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.layers import trunc_normal_
from torch import nn
from torch.overrides import TorchFunctionMode

from .layers import ActDepthwise


class _NoInitialisation(TorchFunctionMode):
    INITIAL = frozenset(("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_"))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.__name__ in self.INITIAL:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Make the models of this context on the meta device, where tensors have no values.

    Initialisations are left out: PyTorch computes the shapes of the meta device in Python, where an
    initialisation takes as long as a layer.
    """
    with torch.device("meta"), _NoInitialisation():
        yield


def init_linear_layers(
    module: nn.Module,
    std: float | None = 0.02,
    *,
    convolutions: bool = False,
    skip: type[nn.Module] | tuple[type[nn.Module], ...] = (),
) -> None:
    """Draw linear layers' weights from a truncated normal distribution, and set biases to zero.

    Args:
        module: its linear layers at any depth, and itself if it is one, are initialised.
        std: standard deviation, or None to leave PyTorch's own initialisation.
        convolutions: whether convolutions are initialised in the same way.
        skip: modules of these classes are left alone, because they initialise themselves.
    """
    if std is None or (skip and isinstance(module, skip)):
        return
    kinds = (nn.Linear, nn.Conv2d, ActDepthwise) if convolutions else (nn.Linear,)
    if isinstance(module, kinds):
        trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    for child in module.children():
        init_linear_layers(child, std, convolutions=convolutions, skip=skip)
    # timm's gated MLPs set the bias of their gates.
    init_weights = getattr(module, "init_weights", None)
    if init_weights is not None and type(module).__module__.startswith("timm."):
        init_weights()


def init_convolutions(
    module: nn.Module, skip: type[nn.Module] | tuple[type[nn.Module], ...] = ()
) -> None:
    """Draw convolutions' weights from N(0, 2 / (k^2 O / groups)), and set biases to zero.

    Args:
        module: its convolutions at any depth, of O channels, and itself if it is one.
        skip: modules of these classes are left alone, because they initialise themselves.
    """
    if skip and isinstance(module, skip):
        return
    if isinstance(module, (nn.Conv2d, ActDepthwise)):
        channels, _, *window = module.weight.shape
        groups = module.groups if isinstance(module, nn.Conv2d) else channels
        fan_out = math.prod(window) * channels // groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    for child in module.children():
        init_convolutions(child, skip)


def init_as_convolution(linear: nn.Linear) -> None:
    """Initialise a linear layer as `init_convolutions` does a convolution of 1 x 1."""
    nn.init.normal_(linear.weight, std=(2 / linear.out_features) ** 0.5)
    nn.init.zeros_(linear.bias)
