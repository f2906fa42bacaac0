"""Convolutions whose attributes a user changes."""

import copy
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import PARTS, distance, images, little, of_type, put, two_blocks


def observe(model: nn.Module, names: Iterable[str], x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The input and the output of each module in `names`."""
    seen = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda part, args, output, calls=calls: calls.append((args[0], output))
        )
        for name, calls in seen.items()
    ]
    model(x)
    for handle in handles:
        handle.remove()
    assert {name: len(calls) for name, calls in seen.items()} == dict.fromkeys(seen, 1)
    return {name: calls[0] for name, calls in seen.items()}


@pytest.mark.parametrize(
    ("attribute", "change"),
    [
        ("dilation", lambda conv: {"dilation": 2, "padding": tuple(2 * p for p in conv.padding)}),
        # Not circular, which PyTorch refuses where a window is larger than the map.
        ("padding_mode", lambda conv: {"padding_mode": "replicate"}),
        ("groups", lambda conv: {"groups": 1 if conv.groups > 1 else 2}),
    ],
    ids=["dilation", "padding_mode", "groups"],
)
@pytest.mark.parametrize("name", PARTS)
@torch.inference_mode()
def test_convolutions_heed_their_own_attributes(name, attribute, change):
    """A convolution of the model's class computes what PyTorch's with the same attributes computes.

    A class that is no plain convolution (it adds its input, or applies an activation) must change
    its output.
    """
    model, x = little(name, **two_blocks(name)), images()
    convolutions, failures = of_type(model, nn.Conv2d), {}
    own = observe(model, convolutions, x)
    for leaf, part in convolutions.items():
        half = tuple(side // 2 for side in part.kernel_size)
        if attribute != "groups" and (part.padding != half or not any(half)):
            continue  # Without a border of half the kernel, neither keeps the shape or has effect.
        if attribute == "groups" and (part.in_channels % 2 or part.out_channels % 2):
            continue
        shape = {
            "stride": part.stride,
            "padding": part.padding,
            "dilation": part.dilation,
            "groups": part.groups,
            "bias": part.bias is not None,
        }
        peer = nn.Conv2d(
            part.in_channels, part.out_channels, part.kernel_size, **shape | change(part)
        ).double()
        given, before = own[leaf]
        try:
            other = copy.deepcopy(part)
            other.__dict__.update(
                {key: value for key, value in vars(peer).items() if not key.startswith("_")}
            )
            other._reversed_padding_repeated_twice = peer._reversed_padding_repeated_twice
            # The groups' number is in the shape of the weights.
            if attribute == "groups":
                other.weight = peer.weight
            else:
                peer.weight = part.weight
            peer.bias = other.bias
            wanted = peer(given)
            put(model, leaf, other)
            _, got = observe(model, [leaf], x)[leaf]
            put(model, leaf, part)
        except (AssertionError, RuntimeError, ValueError) as error:
            put(model, leaf, part)
            failures[leaf] = f"{type(error).__name__}: {error}"
            continue
        if distance(got, before) < 1e-9:
            failures[leaf] = "changes nothing"
        elif is_plain(part, given, before) and distance(got, wanted) > 1e-9:
            failures[leaf] = f"{distance(got, wanted):.1e} off"
    assert failures == {}


def is_plain(conv: nn.Conv2d, x: Tensor, output: Tensor) -> bool:
    """Whether a module gives a convolution of its first input, and nothing more."""
    y = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return y.shape == output.shape and distance(output, y) < 1e-9
