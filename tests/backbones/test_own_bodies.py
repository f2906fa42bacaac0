"""Bodies that have few models: at any size, with every mixer, exported."""

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch.export import Dim

from linsight.backbones.mixers import MIXERS

from .conftest import lively

# A model of each body that is small enough for tests.
LITTLE = {
    "care_s0": {
        "embed_dim": (16, 32, 32, 64),
        "num_heads": (2, 2, 2, 4),
        "mlp_ratios": (2, 2, 2, 2),
    },
    "ecoformer_twins_small": {"embed_dim": 16, "num_heads": (2, 2, 4, 4)},
    "flowformer_19": {"embed_dim": 16, "num_heads": (2, 2, 4, 4)},
}


def little(name, **kwargs):
    model = {"depths": (2, 1, 1, 1), "num_classes": 5} | LITTLE[name]
    return timm.create_model(name, **model | kwargs)


@pytest.mark.parametrize("name", LITTLE)
@pytest.mark.parametrize("size", [(64, 64), (32, 96), (50, 77)])
def test_any_size(name, size):
    model = lively(little(name))
    x = torch.randn(2, 3, *size)
    with torch.inference_mode():
        features, maps = model.forward_intermediates(x, output_fmt="NHWC")
        assert torch.equal(features, model.forward_features(x))
        assert [m.shape[1:3] for m in maps] == [
            tuple(-(-side // 2**i) for side in size) for i in (2, 3, 4, 5)
        ]
        # No statistic is taken over several images.
        torch.testing.assert_close(model(x), torch.cat([model(i[None]) for i in x]))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", LITTLE)
def test_every_mixer_trains(name, mixer):
    model = little(name, mixer=mixer, img_size=64)
    model(torch.randn(2, 3, 64, 96)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", LITTLE)
def test_export(name):
    model = lively(little(name, depths=(0, 0, 0, 1)))
    height, width = (Dim(side, min=65, max=2048) for side in ("height", "width"))
    shapes = ({0: Dim("batch", min=1, max=64), 2: height, 3: width},)
    program = torch.export.export(model, (torch.randn(2, 3, 96, 128),), dynamic_shapes=shapes)
    with torch.inference_mode():
        for batch, height, width in ((2, 128, 128), (3, 97, 131)):
            x = torch.randn(batch, 3, height, width)
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["care_s0", "flowformer_19"])
def test_layer_scales_do_not_decay(name):
    model = little(name)
    kept, _ = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    scales = {id(p) for n, p in model.named_parameters() if ".gamma" in n}
    assert scales
    assert scales <= {id(p) for p in kept["params"]}


def test_care_has_a_classifier_for_distillation():
    """Logits are the mean of two; in distilled training they are given as a pair."""
    model = lively(little("care_s0")).train()
    x = torch.randn(2, 3, 64, 64)
    model.set_distilled_training()
    with torch.no_grad():
        own, distilled = model(x)
        model.set_distilled_training(False)
        # Batch norms have moved, but training does not read their running statistics.
        torch.testing.assert_close(model(x), (own + distilled) / 2)
    assert len(model.get_classifier()) == 2
    model.reset_classifier(7)
    assert {layer.out_features for layer in model.get_classifier()} == {7}


def test_the_features_of_care_are_as_wide_as_its_last_blocks_output():
    assert little("care_s0").feature_info[-1]["num_chs"] == 2 * 64
    plain = little("care_s0", block="transformer", mlp_ratios=(3, 3, 3, 3))
    assert plain.feature_info[-1]["num_chs"] == plain.head.fc.in_features == 64
    other = little("care_s0", mlp_layer="swiglu")
    assert other(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    assert other.head.fc.in_features == 2 * 64


def test_care_shares_a_quarter_of_the_channels_among_heads():
    with pytest.raises(ValueError, match="choose a width that is a multiple of 12"):
        timm.create_model("softmax_swin_tiny", mixer="care", embed_dim=30)
