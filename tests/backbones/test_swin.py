"""The Swin and CSwin skeletons: against timm's Swin, at any size, with every mixer."""

import re

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linsight.backbones.mixers import MIXERS

from .conftest import lively

LITTLE = {"embed_dim": 16, "depths": (1, 2, 2, 2), "num_heads": (2, 2, 4, 4)}
SKELETONS = ("softmax_swin_tiny", "softmax_cswin_tiny")


def load(name, weights, path, **kwargs):
    """The model `name`, with `weights` loaded as timm loads a file."""
    torch.save(weights, path)
    overlay = {"file": str(path)}
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs
    ).eval()


def little(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **(LITTLE | {"num_classes": 5} | kwargs)).eval()


def relative(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


def lively_swin(**kwargs):
    """timm's Swin, with biases that matter."""
    model = lively(timm.create_model("swin_tiny_patch4_window7_224", **kwargs))
    with torch.no_grad():
        for name, table in model.named_parameters():
            if name.endswith("relative_position_bias_table"):
                table.normal_()
    return model


@pytest.mark.parametrize(
    ("size", "kwargs"),
    [
        ((224, 224), {}),
        # 50 x 66, 25 x 33, 13 x 17 and 7 x 9 tokens: padded, in the last stage along one side.
        ((200, 264), LITTLE),
        # Windows shrink to maps of 6 x 4 and 3 x 2 tokens.
        ((100, 64), LITTLE),
    ],
    ids=["tiny", "padded", "small"],
)
def test_softmax_swin_is_timms(size, kwargs, tmp_path):
    theirs = lively_swin(img_size=size, strict_img_size=True, **kwargs)
    weights = {
        # timm makes a table for each window; ours are looked up in that of the largest.
        name: inner_offsets(value)
        if name.endswith("relative_position_bias_table") and size == (100, 64)
        else value
        for name, value in theirs.state_dict().items()
    }
    ours = load("softmax_swin_tiny", weights, tmp_path / "swin.pth", **kwargs)
    images = [torch.randn(1, 3, *size).requires_grad_() for _ in range(1)] * 2
    results = []
    for model, image in zip((theirs, ours), images, strict=True):
        features, stages = model.forward_intermediates(image)
        logits = model.forward_head(features.permute(0, 1, 2, 3))
        (gradient,) = torch.autograd.grad(logits.square().sum(), image)
        results.append([logits, *stages, gradient])
    for wanted, got in zip(*results, strict=True):
        assert relative(got, wanted) < 1e-5
