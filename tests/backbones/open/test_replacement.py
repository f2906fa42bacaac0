"""Other modules in the place of the model's own."""

import copy
from collections import defaultdict
from collections.abc import Iterator

import pytest
import timm
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linsight.backbones.norms import RepBN

from .models import PARTS, calls, distance, give, images, leaves, little, of_type, put, two_blocks

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, RepBN)
# Classes are compared by name, because timm has its own versions of some of PyTorch's.
ACTIVATIONS = {"GELU", "GELUTanh", "ReLU", "SiLU", "Swish", "Hardswish", "HardSwish", "Tanh", "ELU"}


class NormOfChannels(nn.Module):
    """Root-mean-square norm over the axis of `channels`, which can replace any norm of a model."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        shape = getattr(norm, "normalized_shape", None) or (norm.num_features,)
        self.weight = nn.Parameter(torch.rand(shape, dtype=torch.float64) + 0.5)
        # PyTorch's batch and group norms have channels second, other norms may have them last.
        own = type(norm).__module__.startswith("torch.nn")
        self.second = own and not hasattr(norm, "normalized_shape")

    def forward(self, x: Tensor) -> Tensor:
        last = x.shape[-1] == self.weight.numel() and not self.second
        x = x if last else x.movedim(1, -1)
        x = F.rms_norm(x, self.weight.shape, self.weight)
        return x if last else x.movedim(-1, 1)


def convolution_like(conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution of PyTorch with the shapes of `conv`, but other weights, padding, dilation."""
    wide = all(side % 2 for side in conv.kernel_size) and max(conv.kernel_size) > 1
    return nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        # Twice the dilation needs twice the padding for as many outputs.
        padding=tuple(2 * side for side in conv.padding) if wide else conv.padding,
        dilation=tuple(2 * step for step in conv.dilation) if wide else 1,
        groups=conv.groups,
        padding_mode="circular" if any(conv.padding) and not wide else "zeros",
        dtype=torch.float64,
    )


def other_modules(part: nn.Module) -> Iterator[nn.Module]:
    """Modules that a user may put in the place of a leaf."""
    if type(part).__name__ in ACTIVATIONS:
        # timm's Swish is PyTorch's SiLU.
        own = {"Swish": "SiLU"}.get(type(part).__name__, type(part).__name__)
        yield from (act() for act in (nn.SiLU, nn.ReLU, nn.Tanh) if act.__name__ != own)
    elif isinstance(part, nn.Linear):
        yield nn.Linear(part.in_features, part.out_features, dtype=torch.float64)
        yield nn.Sequential(copy.deepcopy(part), nn.Tanh())
    elif isinstance(part, NORMS):
        yield NormOfChannels(part)
        other = copy.deepcopy(part)
        for weight in other.parameters():
            nn.init.normal_(weight)
        yield other
        if isinstance(part, nn.BatchNorm2d) and type(part) is nn.BatchNorm2d:
            yield nn.GroupNorm(1, part.num_features, dtype=torch.float64)
    elif isinstance(part, nn.Conv2d):
        yield convolution_like(part)


def replace(
    model: nn.Module, others: dict[str, nn.Module], x: Tensor, plain: Tensor
) -> dict[str, str]:
    """What is wrong with the output when other modules stand in the place of leaves.

    Args:
        model: given back as it was.
        others: the other modules, by the names of the leaves.
        x: images.
        plain: the model's own output.

    Returns:
        The faults by leaf, which are looked for only if the leaves together have one.
    """
    parts = {leaf: model.get_submodule(leaf) for leaf in others}
    handles = [parts[leaf].register_forward_hook(give(other)) for leaf, other in others.items()]
    try:
        wanted = model(x)
        for handle in handles:
            handle.remove()
        for leaf, other in others.items():
            put(model, leaf, other)
        got = model(x)
        fault = "" if torch.equal(got, wanted) else f"{distance(got, wanted):.1e} off"
        if distance(got, plain) < 1e-9:
            fault = "changes nothing"
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    finally:
        for handle in handles:
            handle.remove()
        for leaf, part in parts.items():
            put(model, leaf, part)
    if not fault:
        return {}
    if len(others) == 1:
        return {leaf: f"{type(other).__name__}: {fault}" for leaf, other in others.items()}
    singly = [replace(model, {leaf: other}, x, plain) for leaf, other in others.items()]
    faults = {leaf: text for found in singly for leaf, text in found.items()}
    return faults or {", ".join(others): fault}


@pytest.mark.parametrize("name", PARTS)
@torch.inference_mode()
def test_another_module_computes_in_the_place_of_a_leaf(name):
    """The output is what it is when a hook puts the other module's result in the leaf's place.

    All leaves of a kind are replaced together, while the layers between them are the model's own;
    that each one has an effect is shown by the poison.
    """
    # Windows that divide the map: no hook can tell what stands at the places of a padded one.
    divisors = {"window_size": (4, 4, 2, 1)}
    options = dict.fromkeys(("window", "local_window"), divisors)
    model, x = little(name, mixer_options=options, **two_blocks(name, 1)), images()
    plain = model(x)
    faults = {leaf: "does not run" for leaf, times in calls(model, x).items() if times != 1}
    rounds, kinds = defaultdict(dict), set()
    for leaf, part in leaves(model).items():
        if leaf in faults:
            continue
        for number, other in enumerate(other_modules(part)):
            kinds.add(type(part))
            # A batch norm that has just been made would train.
            rounds[kind_of(part), number][leaf] = other.eval()
    for others in rounds.values():
        faults |= replace(model, others, x, plain)
    assert faults == {}
    for expected in (nn.Conv2d, nn.Linear, NORMS):
        assert any(issubclass(kind, expected) for kind in kinds), f"none of {expected} is a leaf"
    # A convolution or batch norm that computes the activation is one leaf with it.
    fused = any(getattr(part, "activation", None) for part in leaves(model).values())
    assert fused or any(kind.__name__ in ACTIVATIONS for kind in kinds), "no activation is a leaf"


def kind_of(part: nn.Module) -> str:
    """What a leaf is, for its replacement together with others."""
    kinds = {nn.Linear: "linear", nn.Conv2d: "convolution"} | dict.fromkeys(NORMS, "norm")
    return next((kind for base, kind in kinds.items() if isinstance(part, base)), "activation")


@torch.inference_mode()
def test_another_projection_stands_at_padded_places():
    """Tokens of zeros around a map are projected by whatever module projects the others."""
    model, x = little("softmax_swin_tiny"), images()
    wanted = model(x)
    for leaf, part in of_type(model, nn.Linear).items():
        if leaf.endswith("in_proj"):
            put(model, leaf, nn.Sequential(part, nn.Identity()))
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("name", PARTS)
@torch.inference_mode()
def test_synchronised_batch_norms_keep_the_outputs(name):
    """The conversions of PyTorch and timm lose no activation together with a norm."""
    model, x = little(name, **two_blocks(name)), images()
    wanted = model(x)
    norms = of_type(model, nn.modules.batchnorm._BatchNorm)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # timm has its own conversion for its norms with an activation.
    synchronised = timm.layers.convert_sync_batchnorm(synchronised)
    assert set(of_type(synchronised, nn.SyncBatchNorm)) == set(norms)
    torch.testing.assert_close(synchronised(x), wanted)
