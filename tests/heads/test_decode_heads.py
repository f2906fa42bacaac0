"""The heads of semantic segmentation against mmsegmentation's, with the same weights."""

import pytest
import torch
from mmengine.registry import MODELS

from linsight.heads import decode_head

CHANNELS = [16, 24, 32, 40]
STRIDES = [4, 8, 16, 32]
# The sizes are odd, as they are for an image of 132 x 196 pixels.
MAPS = [
    torch.randn(2, c, -(-132 // s), -(-196 // s)) for c, s in zip(CHANNELS, STRIDES, strict=True)
]

OURS = {
    "UPerHead": {"channels": 24},
    "SegformerHead": {"channels": 24},
    "FCNHead": {"channels": 24, "num_convs": 2},
    "FPNHead": {"channels": 24, "feature_strides": STRIDES},
}
THEIRS = {
    "UPerHead": {"pool_scales": (1, 2, 3, 6), "in_index": [0, 1, 2, 3]},
    "FCNHead": {"in_channels": CHANNELS[2], "in_index": 2, "concat_input": False},
    "FPNHead": {"in_index": [0, 1, 2, 3]},
}


def build(name: str, **options):
    torch.manual_seed(0)
    settings = {"in_channels": CHANNELS, "num_classes": 7, **OURS[name], **options}
    return MODELS.build({"type": name, **settings})


@pytest.mark.parametrize("name", OURS)
def test_logits_at_the_finest_map(name):
    head = build(name)
    logits = head(MAPS)
    finest = MAPS[2] if name == "FCNHead" else MAPS[0]
    assert logits.shape == (2, 7, *finest.shape[2:])
    logits.square().mean().backward()
    assert [n for n, p in head.named_parameters() if p.grad is None] == []


def test_fusing_before_resizing_is_fusing_after():
    """The head gives what SegFormer's paper does, which concatenates maps at the finest size."""
    from torch.nn.functional import interpolate, linear

    def embed(layer, x):
        return linear(x.movedim(1, -1), layer.weight.flatten(1), layer.bias).movedim(-1, 1)

    head = build("SegformerHead").eval()
    size = MAPS[0].shape[2:]
    resized = [
        interpolate(embed(conv.conv, x), size, mode="bilinear", align_corners=False)
        for conv, x in zip(head.convs, MAPS, strict=True)
    ]
    expected = head.fusion_conv(torch.cat(resized, 1))
    torch.testing.assert_close(head.decode(MAPS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", [*THEIRS, "FPN"])
def test_against_mmsegmentation(name, train):
    pytest.importorskip("mmseg", reason="mmsegmentation is not installed")
    from mmseg.models import decode_heads, necks

    if name == "FPN":
        ours = MODELS.build({"type": "FPN", "in_channels": CHANNELS, "out_channels": 24})
        theirs = necks.FPN(in_channels=CHANNELS, out_channels=24, num_outs=4)
    else:
        ours = build(name, dropout_ratio=0.0)
        settings = {"in_channels": CHANNELS, **OURS[name], **THEIRS[name]}
        theirs = getattr(decode_heads, name)(
            num_classes=7,
            norm_cfg={"type": "BN"},
            dropout_ratio=0.0,
            align_corners=False,
            loss_decode={"type": "mmseg.CrossEntropyLoss"},
            **settings,
        )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for got, wanted in zip(ours.train(train)(MAPS), theirs.train(train)(MAPS), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("FCNHead", {"in_index": 4}, r"in_index is \(4,\), but there are maps 0 to 3"),
        ("FPNHead", {"feature_strides": [4, 8, 16]}, "for 4 maps"),
        ("FPNHead", {"feature_strides": [4, 8, 20, 32]}, "power of two"),
    ],
)
def test_bad_arguments_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


def test_a_map_of_many_elements_is_resized_some_channels_at_a_time(monkeypatch):
    x = torch.randn(2, 7, 5, 3).to(memory_format=torch.channels_last).requires_grad_()
    whole = decode_head.resize(x, (9, 8))
    (expected,) = torch.autograd.grad(whole.square().sum(), x)
    for most in (1, 2 * 9 * 8 * 3):
        monkeypatch.setattr(decode_head, "MOST_ELEMENTS", most)
        parts = decode_head.resize(x, (9, 8))
        assert torch.equal(parts, whole)
        torch.testing.assert_close(torch.autograd.grad(parts.square().sum(), x)[0], expected)
