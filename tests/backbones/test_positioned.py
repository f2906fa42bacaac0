"""What FLatten and SLAB share: positions of the keys, and filters that heads share."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils.model import reparameterize_model

from linsight.backbones.context import Context, Place
from linsight.backbones.mixers import build_mixer
from linsight.backbones.mixers.positioned import PositionedAttention

from .conftest import lively

LITTLE = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 4, 4), "num_classes": 5}


def attention(mixer="flatten", **options):
    return lively(build_mixer(mixer, Place(16, 2, (6, 4)), {mixer: options}).double()).attention


def test_positions_are_interpolated_bicubically():
    part = attention()
    got = part.key_positions(Context((9, 5)), part.position).flatten(1).unflatten(0, (9, 5))
    table = part.position.permute(2, 0, 1)
    wanted = F.interpolate(table[None], (9, 5), mode="bicubic", align_corners=False)[0]
    torch.testing.assert_close(got.permute(2, 0, 1), wanted)
    got = part.key_positions(Context((6, 4)), part.position)
    assert torch.equal(got.flatten(), part.position.flatten())


@pytest.mark.parametrize("mixer", ["flatten", "slab"])
def test_both_convolutions_are_one(mixer):
    """Heads share the filters of one convolution; each channel has its own of the other."""
    part = attention(mixer, channel_kernel=3)
    value = torch.randn(1, 16, 6, 4, dtype=torch.float64)
    heads = [
        F.conv2d(head, part.local_weight, part.local_bias, padding=2, groups=8)
        for head in value.chunk(2, 1)
    ]
    wanted = torch.cat(heads, 1)
    wanted = wanted + F.conv2d(value, part.channel_weight, part.channel_bias, padding=1, groups=16)
    tokens = value.flatten(2).transpose(1, 2).unflatten(-1, (2, 8))
    got = part.local_branch(tokens, (6, 4)).flatten(2).transpose(1, 2).unflatten(2, (6, 4))
    torch.testing.assert_close(got, wanted)
    with pytest.raises(ValueError, match="channel_kernel is 7, expected at most local_kernel = 5"):
        attention(mixer, channel_kernel=7)


@pytest.mark.parametrize("name", ["flatten_cswin_tiny", "flatten_pvtv2_b0", "slab_cswin_tiny"])
def test_folded_filters_change_nothing(name):
    model = lively(timm.create_model(name, img_size=64, **LITTLE).double())
    folded = reparameterize_model(model)
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    parts = [part for part in folded.modules() if isinstance(part, PositionedAttention)]
    assert parts
    for part in parts:
        assert len(part.local_weight) == part.num_heads * part.head_dim
        assert part.channel_weight is None
    with torch.inference_mode():
        torch.testing.assert_close(folded(x), model(x))


@pytest.mark.parametrize("img_size", [224, 64])
def test_loading_at_another_size(img_size, tmp_path):
    """The authors' positions, of a square map, give what the model computes at the other size."""
    model = lively(timm.create_model("flatten_swin_tiny", img_size=64, **LITTLE))
    weights = {
        name.replace("attention.position", "positional_encoding"): value.flatten(0, 1)[None]
        if name.endswith("attention.position")
        else value
        for name, value in model.state_dict().items()
    }
    torch.save(weights, tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth"), "num_classes": 5}
    other = timm.create_model(
        "flatten_swin_tiny",
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        img_size=img_size,
        **LITTLE,
    )
    x = torch.randn(1, 3, img_size, img_size)
    with torch.inference_mode():
        torch.testing.assert_close(other.eval()(x), model(x))


def test_class_tokens_have_no_position():
    mixer = build_mixer("flatten", Place(16, 2, (3, 2), prefix_tokens=1)).eval()
    with torch.no_grad():
        mixer.attention.position.normal_()
        assert not mixer.attention.key_positions(Context((3, 2), 1), torch.empty(0))[0].any()
        assert mixer(torch.randn(2, 7, 16), Context((3, 2), 1)).shape == (2, 7, 16)
