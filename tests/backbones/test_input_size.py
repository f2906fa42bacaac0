"""`set_input_size`: the model that `timm.create_model(name, img_size=...)` makes of the weights."""

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model

import linsight  # noqa: F401

from .conftest import lively

PLAIN = {"embed_dim": 32, "depth": 2, "num_heads": 2}
STAGES = {"embed_dim": (16, 32, 32, 64), "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 4)}
LITTLE = {
    "agent_deit_tiny": PLAIN,
    "agent_pvt_tiny": STAGES,
    "agent_swin_tiny": STAGES,
    "flatten_swin_tiny": STAGES,
    "flatten_pvt_tiny": STAGES,
    "flowformer_19": STAGES,
    "mhla_deit_tiny": PLAIN,
    "rala_vit_nano": {},
    "soft_vit_nano": {},
    "softmax_dinov2_small": PLAIN,
    "softmax_dinov3_small": PLAIN,
    "softmax_swin_tiny": STAGES,
}


def little(name, **kwargs):
    options = {"img_size": 64, "num_classes": 5} | kwargs
    return timm.create_model(name, **LITTLE[name] | options)


@pytest.mark.parametrize("name", LITTLE)
def test_it_is_the_model_built_for_that_size(name, tmp_path):
    model = lively(little(name)).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 5}
    built = little(name, img_size=(96, 64), pretrained=True, pretrained_cfg_overlay=overlay).eval()
    model.set_input_size((96, 64))
    torch.testing.assert_close(model.state_dict(), built.state_dict())
    images = torch.randn(1, 3, 96, 64)
    torch.testing.assert_close(model(images), built(images))
    assert model.model_args["img_size"] == (96, 64)
    assert model._traits["img_size"] == (96, 64)  # what timm exports
    # The record builds the same model again.
    again = timm.create_model(name, **model.model_args)
    again.load_state_dict(model.state_dict())


def test_back_again():
    model = little("agent_deit_tiny")
    model.set_input_size(96)
    assert model.pos_embed.shape[1] == 37
    model.set_input_size(64)
    assert model.pos_embed.shape[1] == 17
    assert model.pos_embed.requires_grad


def test_windows_and_patches():
    model = lively(little("softmax_swin_tiny")).eval()
    images = torch.randn(1, 3, 64, 64)
    before = model(images)
    model.set_input_size(window_size=(4, 4, 2, 2))
    mixers = [stage.blocks[0].mixer for stage in model.stages]
    assert [m.attention.window_size for m in mixers] == [4, 4, 2, 2]
    assert [len(m.attention.relative_position_bias_table) for m in mixers] == [49, 49, 9, 9]
    assert not torch.allclose(model(images), before)
    again = timm.create_model("softmax_swin_tiny", **model.model_args).eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(images), model(images))

    plain = lively(little("agent_deit_tiny")).eval()
    plain.set_input_size(patch_size=8)
    assert plain.patch_embed.proj.weight.shape[-1] == 8
    assert [info["reduction"] for info in plain.feature_info] == [8, 8]
    assert plain(images).shape == (1, 5)
    again = timm.create_model("agent_deit_tiny", **plain.model_args).eval()
    again.load_state_dict(plain.state_dict())
    torch.testing.assert_close(again(images), plain(images))


def test_what_cannot_be_is_refused_and_changes_nothing():
    landmarks = little("softmax_swin_tiny", mixer="softmax_free", img_size=64)
    cases = (
        (little("rala_vit_nano"), {"img_size": 16}, "img_size is 16, at least 32"),
        (little("agent_deit_tiny"), {"img_size": (64, 0)}, "expected the side of the images"),
        (little("agent_deit_tiny"), {"img_size": "64"}, "expected the side of the images"),
        (little("agent_deit_tiny"), {"window_size": 7}, "no mixer of VisionTransformer"),
        (little("agent_deit_tiny"), {"patch_size": (8, 4)}, "expected one side"),
        (little("softmax_swin_tiny"), {"patch_size": 2}, "the stem of SwinTransformer"),
        (little("softmax_swin_tiny"), {"window_size": (7, 7)}, "each of the 4 stages"),
        (landmarks, {"img_size": 224}, "build the model with mixer_options"),
        (reparameterize_model(little("agent_deit_tiny")), {"img_size": 96}, "are folded"),
    )
    for model, options, message in cases:
        before = {key: value.shape for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            model.set_input_size(**options)
        assert {key: value.shape for key, value in model.state_dict().items()} == before
