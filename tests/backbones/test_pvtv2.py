"""The Pyramid Vision Transformer, version 2: against timm's, and the mixers that its body holds."""

import re

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from linsight.backbones.mixers import MIXERS

from .conftest import lively

# A PVTv2 that is small enough for tests.
NANO = {"embed_dim": (16, 32, 32, 64), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)}
NANO |= {"mlp_ratios": (2, 2, 2, 2), "num_classes": 5}


def authors_name(name):
    """What the authors call a weight of timm's model."""
    name = name.replace("patch_embed.", "patch_embed1.").replace("dwconv.", "dwconv.dwconv.")
    parts = {"downsample": "patch_embed", "blocks": "block", "norm": "norm"}
    return re.sub(r"^stages\.(\d)\.([a-z]+)", lambda m: f"{parts[m[2]]}{int(m[1]) + 1}", name)


def relative(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("names", ["timm", "authors"])
def test_softmax_pvtv2_is_timms(names, tmp_path):
    theirs = lively(timm.create_model("pvt_v2_b0"))
    weights = theirs.state_dict()
    if names == "authors":
        weights = {authors_name(name): value for name, value in weights.items()}
    torch.save(weights, tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth")}
    ours = timm.create_model("softmax_pvtv2_b0", pretrained=True, pretrained_cfg_overlay=overlay)
    image = torch.randn(1, 3, 160, 224).requires_grad_()
    results = []
    for model in (theirs, ours.eval()):
        features, stages = model.forward_intermediates(image)
        logits = model.forward_head(features)
        (gradient,) = torch.autograd.grad(logits.square().sum(), image)
        results.append([logits, *stages, gradient])
    for wanted, got in zip(*results, strict=True):
        assert relative(got, wanted) < 1e-5


def test_initial_weights_are_drawn_as_timms():
    ours = timm.create_model("softmax_pvtv2_b1").state_dict()
    theirs = timm.create_model("pvt_v2_b1").state_dict()
    for name, layer in (
        ("stages.0.blocks.0.mlp.depthwise.weight", "stages.0.blocks.0.mlp.dwconv.weight"),
        ("stages.0.blocks.0.mixer.reduce.weight", "stages.0.blocks.0.attn.sr.weight"),
        ("stages.1.downsample.proj.weight", "stages.1.downsample.proj.weight"),
        ("stages.1.blocks.0.mixer.query.weight", "stages.1.blocks.0.attn.q.weight"),
    ):
        assert ours[name].std().item() == pytest.approx(theirs[layer].std().item(), rel=0.1)


@pytest.mark.parametrize("size", [(32, 96), (50, 77)])
def test_any_size(size):
    model = lively(timm.create_model("softmax_pvtv2_b0", **NANO))
    x = torch.randn(2, 3, *size)
    with torch.inference_mode():
        features, maps = model.forward_intermediates(x)
        assert torch.equal(features, model.forward_features(x))
        assert [m.shape[2:] for m in maps] == [
            tuple(-(-side // 2**i) for side in size) for i in (2, 3, 4, 5)
        ]
        torch.testing.assert_close(model(x), torch.cat([model(i[None]) for i in x]))


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_trains(mixer):
    options = {
        # One head cannot be shared by the two directions of stripes.
        "cross_window": {"split_size": (None, 2, 2, 2)},
        "spatial_reduction": {"reduction": 2},
    }
    model = timm.create_model(
        "softmax_pvtv2_b0", mixer=mixer, img_size=64, **NANO | {"mixer_options": options}
    )
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_a_stages_norm_is_in_the_group_of_its_last_block():
    model = timm.create_model("softmax_pvtv2_b0", **NANO | {"depths": (2, 1, 1, 1)})
    groups = param_groups_layer_decay(model, 0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    scales = {name: scale[id(p)] for name, p in model.named_parameters()}
    names = ["stem.proj.weight", "stages.0.blocks.0.mlp.fc1.weight"]
    names += ["stages.0.blocks.1.mlp.fc1.weight", "stages.1.blocks.0.mlp.fc1.weight"]
    assert [scales[n] for n in names] == sorted({scales[n] for n in names})
    assert scales["stages.0.norm.weight"] == scales["stages.0.blocks.1.mlp.fc1.weight"]
    assert scales["stages.3.norm.weight"] == scales["stages.3.blocks.0.mlp.fc1.weight"]
