"""The body of Twins-SVT: against timm's."""

import pytest
import timm
import torch

from .conftest import lively

LITTLE = {"depths": (2, 2, 2, 2), "num_heads": (2, 2, 4, 4), "num_classes": 5}
MIXERS = (("local_window", "spatial_reduction"),) * 3 + (("local_window", "softmax"),)


def relative(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(
    ("size", "arguments", "theirs"),
    [
        ((224, 224), {}, {}),
        # Maps of 32 x 80, 16 x 40, 8 x 20 and 4 x 10 tokens are padded to windows.
        (
            (128, 320),
            LITTLE | {"embed_dim": 16, "mixer": MIXERS},
            LITTLE | {"embed_dims": (16, 32, 64, 128)},
        ),
    ],
    ids=["small", "padded"],
)
def test_softmax_twins_is_timms(size, arguments, theirs, tmp_path):
    timms = lively(timm.create_model("twins_svt_small", img_size=size, **theirs))
    torch.save(timms.state_dict(), tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth"), "num_classes": timms.num_classes}
    ours = timm.create_model(
        "softmax_twins_small", pretrained=True, pretrained_cfg_overlay=overlay, **arguments
    )
    assert ours.no_weight_decay() == {
        f"stages.{name.split('.')[1]}.position.{name.split('.')[-1]}"
        for name in timms.no_weight_decay()
    }
    image = torch.randn(1, 3, *size).requires_grad_()
    results = []
    for model in (timms, ours.eval()):
        features, stages = model.forward_intermediates(image)
        logits = model.forward_head(features)
        (gradient,) = torch.autograd.grad(logits.square().sum(), image)
        results.append([logits, *stages, gradient])
    for wanted, got in zip(*results, strict=True):
        assert relative(got, wanted) < 1e-5


def test_initial_weights_are_drawn_as_timms():
    ours = timm.create_model("softmax_twins_small").state_dict()
    theirs = timm.create_model("twins_svt_small").state_dict()
    for name, layer in (
        ("stages.3.position.weight", "pos_block.3.proj.0.weight"),
        ("stages.1.blocks.1.mixer.reduce.weight", "blocks.1.1.attn.sr.weight"),
        ("stages.1.downsample.proj.weight", "patch_embeds.1.proj.weight"),
        ("stages.0.blocks.0.mixer.in_proj.weight", "blocks.0.0.attn.qkv.weight"),
    ):
        assert ours[name].std().item() == pytest.approx(theirs[layer].std().item(), rel=0.1)
    assert not ours["stages.3.position.bias"].any()
