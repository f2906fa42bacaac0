"""Other norms, activations, feed-forward networks and blocks, by the arguments of a model."""

from collections.abc import Callable
from functools import partial

import pytest
import timm
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linsight.backbones.blocks import TransformerBlock
from linsight.backbones.context import Context
from linsight.backbones.norms import PRepBN, set_training_progress

from ..conftest import lively
from .models import (
    SKELETONS,
    create,
    distance,
    images,
    leaves,
    little,
    of_type,
    two_blocks,
)


class Halved(TransformerBlock):
    """A block of the user's own, which any skeleton holds."""

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return 0.5 * super().forward(x, context)


def norms_of_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The norms of each block, without the norms of its mixer."""
    return {
        name: part
        for name, part in leaves(model).items()
        if "norm" in name.rpartition(".")[2]
        and "blocks." in name
        and ".mixer." not in name
        and not isinstance(part, nn.Identity)  # timm's MLPs have a place for a norm
    }


def parts_of_mlps(model: nn.Module) -> list[nn.Module]:
    return [part for name, part in model.named_modules() if ".mlp" in name]


def assert_trains(model: nn.Module) -> None:
    """Each parameter gets a gradient."""
    model = lively(model.double()).train()
    model(images()).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


AXES = {
    "norm-activation": {"norm_layer": "prepbn", "act_layer": "relu"},
    "mlp-block": {"mlp_layer": timm.layers.GluMlp, "block": Halved},
}
# A plain, a windowed and a convolutional body, and two pyramids.
EXPORTED = {
    ("softmax_deit_tiny", "norm-activation"),
    ("softmax_swin_tiny", "norm-activation"),
    ("van_b0", "norm-activation"),
    ("ecoformer_pvtv2_b0", "mlp-block"),
    ("mala_vit_nano", "mlp-block"),
}


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        pytest.param(
            name,
            AXES[axes],
            marks=[] if (name, axes) in EXPORTED else pytest.mark.slow,
            id=f"{name}-{axes}",
        )
        for name in SKELETONS
        for axes in AXES
    ],
)
def test_another_model_exports(name, axes):
    """An exported program of a model whose parts are others gives the same output."""
    model, x = little(name, **two_blocks(name), **axes), images()
    with torch.inference_mode():
        wanted = model(x)
    program = torch.export.export(model, (x,))
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(x), wanted)


def is_called(name: str) -> Callable[[nn.Module], bool]:
    return lambda part: type(part).__name__.lower() == name


NORM_LAYERS = {
    "prepbn": ("prepbn", is_called("prepbn")),
    "rmsnorm": ("rmsnorm", is_called("rmsnorm")),
    "layernorm": ("layernorm", lambda part: isinstance(part, nn.LayerNorm)),
    "partial": (
        partial(timm.layers.LayerNorm, eps=0.125),
        lambda part: isinstance(part, timm.layers.LayerNorm) and part.eps == 0.125,
    ),
}


@pytest.mark.parametrize("norm_layer", NORM_LAYERS)
@pytest.mark.parametrize("name", SKELETONS)
def test_another_norm(name, norm_layer):
    value, is_chosen = NORM_LAYERS[norm_layer]
    norms = norms_of_blocks(create(name))
    model = create(name, norm_layer=value)
    assert norms_of_blocks(model).keys() == norms.keys() != set()
    assert [n for n, part in norms_of_blocks(model).items() if not is_chosen(part)] == []
    assert_trains(model)


def test_a_progressive_norm_moves_from_layer_to_batch_norm():
    """As SLAB trains it: the output of training depends on how far training is."""
    model, x = lively(create("rala_vit_nano", norm_layer="prepbn").double()).train(), images()
    assert of_type(model, PRepBN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(model(x), torch.tensor([1, 3]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        outputs = []
        for progress in (0, 0.5, 1):
            set_training_progress(model, progress)
            assert {part.progress.item() for part in of_type(model, PRepBN).values()} == {progress}
            outputs.append(model(x))
    assert distance(outputs[1], outputs[0]) > 1e-3
    assert distance(outputs[1], outputs[2]) > 1e-3


ACT_LAYERS = {"relu": nn.ReLU, "silu": nn.SiLU, nn.ReLU: nn.ReLU}


def has_activation(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is an activation, or a layer that the kernels compute together with it."""
    return isinstance(part, kind) or getattr(part, "activation", None) == kind.__name__.lower()


@pytest.mark.parametrize("act_layer", ACT_LAYERS)
@pytest.mark.parametrize("name", SKELETONS)
def test_another_activation(name, act_layer):
    model = create(name, act_layer=act_layer)
    parts = parts_of_mlps(model)
    assert not any(type(part).__name__ == "GELU" for part in parts)
    blocks = [n for n, _ in model.named_modules() if n.rpartition(".")[0].endswith("blocks")]
    assert sum(has_activation(part, ACT_LAYERS[act_layer]) for part in parts) == len(blocks) > 0
    assert_trains(model)


@pytest.mark.parametrize("name", SKELETONS)
def test_another_feed_forward_network(name):
    model = create(name, mlp_layer=timm.layers.GluMlp)
    mlps = [part for n, part in model.named_modules() if n.endswith(".mlp")]
    assert mlps
    assert {type(part) for part in mlps} == {timm.layers.GluMlp}
    assert_trains(model)


def blocks_of(model: nn.Module) -> list[list[nn.Module]]:
    """The blocks of each stage."""
    return (
        [list(s.blocks) for s in model.stages] if hasattr(model, "stages") else [list(model.blocks)]
    )


@pytest.mark.parametrize("name", SKELETONS)
def test_another_block(name):
    """The block is given as one class for all depths, and as one per depth."""
    default = create(name)
    # The second block, because blocks of two kinds may take turns.
    kind = type(blocks_of(default)[0][1])

    class Doubled(kind):
        def forward(self, x, context):
            return 2 * super().forward(x, context)

    all_doubled = create(name, block=Doubled)
    assert {type(block) for stage in blocks_of(all_doubled) for block in stage} == {Doubled}
    assert_trains(all_doubled)

    wanted = [[type(block) for block in stage] for stage in blocks_of(default)]
    wanted[0][1] = Doubled
    mixed = create(name, block=wanted)
    assert [[type(block) for block in stage] for stage in blocks_of(mixed)] == wanted
    default, mixed = lively(default.double()), mixed.double().eval()
    mixed.load_state_dict(default.state_dict())
    block = blocks_of(default)[0][1]
    block.register_forward_hook(lambda _, args, output: 2 * output)
    with torch.inference_mode():
        torch.testing.assert_close(mixed(images()), default(images()))
