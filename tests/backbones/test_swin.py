"""The bodies of Swin and CSwin: against timm's Swin, at any size, with every mixer."""

import re

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linsight.backbones.context import Context
from linsight.backbones.initialization import shapes_only
from linsight.backbones.mixers import MIXERS
from linsight.backbones.mixers.window import resize_position_bias

from .conftest import lively

LITTLE = {"embed_dim": 16, "depths": (1, 2, 2, 2), "num_heads": (2, 2, 4, 4)}
SKELETONS = ("softmax_swin_tiny", "softmax_cswin_tiny")
TABLE = "relative_position_bias_table"


def little(name, **kwargs):
    return lively(timm.create_model(name, **(LITTLE | {"num_classes": 5} | kwargs)))


def timms(**kwargs):
    """timm's Swin, with position biases that are large enough to matter."""
    model = lively(timm.create_model("swin_tiny_patch4_window7_224", **kwargs))
    with torch.no_grad():
        for name, table in model.named_parameters():
            if name.endswith(TABLE):
                table.normal_()
    return model


def load(name, weights, path, **kwargs):
    """The model `name`, with `weights` loaded as timm loads a file."""
    torch.save(weights, path)
    overlay = {"file": str(path)}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    return model.eval()


def relative(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


def of_window(table, window, side=7):
    """The `table` of a window's offsets, in the middle of a larger, square window's table."""
    height, width = (2 * length - 1 for length in window)
    whole = table.new_zeros(2 * side - 1, 2 * side - 1, table.shape[-1])
    top, left = side - window[0], side - window[1]
    whole[top : top + height, left : left + width] = table.view(height, width, -1)
    return whole.flatten(0, 1)


@pytest.mark.parametrize(
    ("size", "kwargs"),
    [
        ((224, 224), {}),
        # Maps of 50 x 66, 25 x 33, 13 x 17 and 7 x 9 tokens are padded, the last along one side.
        ((200, 264), LITTLE),
        # In the last two stages, of 7 x 4 and 4 x 2 tokens, the window is the map.
        ((100, 64), LITTLE),
    ],
    ids=["tiny", "padded", "small"],
)
def test_softmax_swin_is_timms(size, kwargs, tmp_path):
    theirs = timms(img_size=size, **kwargs)
    weights = theirs.state_dict()
    for name in weights:
        if name.endswith(TABLE):
            attention = theirs.get_submodule(name.removesuffix(f".{TABLE}"))
            weights[name] = of_window(weights[name], attention.window_size)
    ours = load("softmax_swin_tiny", weights, tmp_path / "swin.pth", **kwargs)
    image = torch.randn(1, 3, *size).requires_grad_()
    results = []
    for model in (theirs, ours):
        features, stages = model.forward_intermediates(image)
        logits = model.forward_head(features)
        (gradient,) = torch.autograd.grad(logits.square().sum(), image)
        results.append([logits, *stages, gradient])
    for wanted, got in zip(*results, strict=True):
        assert relative(got, wanted) < 1e-5


def test_microsofts_layout(tmp_path):
    """In Microsoft's files, merging ends a stage, the head is one layer, and buffers are saved."""
    theirs = timms(**LITTLE)
    weights = {}
    for name, value in theirs.state_dict().items():
        name = re.sub(
            r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name
        )
        weights[name.replace("head.fc.", "head.")] = value
    weights["layers.1.blocks.1.attn_mask"] = torch.zeros(16, 49, 49)
    weights["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    ours = load("softmax_swin_tiny", {"model": weights}, tmp_path / "swin.pth", **LITTLE)
    image = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert relative(ours(image), theirs(image)) < 1e-5


def test_a_table_for_another_window_is_interpolated(tmp_path):
    theirs = timms(**LITTLE)
    options = {"window": {"window_size": 9}}
    ours = load(
        "softmax_swin_tiny", theirs.state_dict(), tmp_path / "swin.pth", mixer_options=options,
        img_size=288, **LITTLE,
    )  # fmt: skip
    table = getattr(ours.stages[2].blocks[1].mixer.attention, TABLE)
    assert table.shape == (17**2, 4)
    # The middle, an offset of zero, stays in place, and so does the order of rows and columns.
    ramp = torch.arange(13.0).repeat_interleave(13)[:, None].repeat(1, 2)
    wide = resize_position_bias(ramp, 17**2).view(17, 17, 2)
    assert wide[8, 8, 0] == pytest.approx(6)
    assert (wide.diff(dim=0) > 0).all()
    torch.testing.assert_close(wide[:, :1].expand_as(wide), wide)


@pytest.mark.parametrize("name", SKELETONS)
@settings(max_examples=10, deadline=None)
@given(height=st.integers(16, 140), width=st.integers(16, 140))
def test_any_size(name, height, width):
    model = little(name)
    with torch.inference_mode():
        _, stages = model.forward_intermediates(torch.randn(1, 3, height, width))
    # Swin pads the image; CSwin's convolution of stride 4 takes an image as it is.
    extra = 3 if name == "softmax_swin_tiny" else 1
    height, width = (height + extra) // 4, (width + extra) // 4
    for stage, dim in zip(stages, (16, 32, 64, 128), strict=True):
        assert stage.shape == (1, dim, height, width)
        height, width = -(-height // 2), -(-width // 2)


@pytest.mark.parametrize("name", [*SKELETONS, "agent_swin_tiny", "agent_cswin_tiny"])
def test_one_model_runs_a_photograph_too(name):
    model = little(name)
    square, photograph = torch.randn(1, 3, 224, 224), torch.randn(1, 3, 800, 1333)
    with torch.inference_mode():
        before = model(square)
        assert model(photograph).isfinite().all()
        assert torch.equal(model(square), before)


@pytest.mark.parametrize("name", SKELETONS)
def test_one_graph_at_each_size(name):
    """Each size is one graph; tests/kernels compiles the operator for sizes that change."""
    model = little(name, depths=(2, 0, 0, 1))
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    with torch.inference_mode():
        for height, width in ((64, 64), (100, 250)):
            x = torch.randn(2, 3, height, width)
            assert relative(compiled(x), model(x)) < 1e-5


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", SKELETONS)
def test_every_mixer_stands_in_the_skeleton(name, mixer):
    model = timm.create_model(name, mixer=mixer, num_classes=3, img_size=64, **LITTLE)
    model(torch.randn(2, 3, 64, 96)).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


def test_what_makes_no_sense_is_refused():
    for mixer in ("window", "cross_window"):
        with pytest.raises(ValueError, match="1 class tokens stand before the map"):
            timm.create_model("softmax_deit_tiny", mixer=mixer)
    with pytest.raises(ValueError, match="num_heads is 3: one half of the heads"):
        timm.create_model("softmax_swin_tiny", mixer="cross_window")


@pytest.mark.parametrize(
    ("name", "size", "options", "tables"),
    [
        ("agent_swin_small", 288, {"window": {"window_size": 9}}, 17**2),
        ("agent_swin_base", 384, {"window": {"window_size": 12}}, 23**2),
        ("agent_cswin_base", 384, {"cross_window": {"split_size": (1, 2, 12, None)}}, None),
        ("softmax_swin_base", 384, {"window": {"window_size": 12}}, 23**2),
    ],
)
def test_published_variants_for_other_sizes(name, size, options, tables):
    """Arguments alone make them; options that are not named keep the values of the row."""
    with shapes_only():
        model = timm.create_model(name, img_size=size, mixer_options=options)
    parameters = dict(model.named_parameters())
    if name.startswith("agent"):
        assert parameters["stages.0.blocks.0.mixer.attention.row_bias"].shape[2:] == (9, size // 4)
        assert parameters["stages.1.blocks.0.mixer.attention.row_bias"].shape[2:] == (16, size // 8)
    assert {p.shape[0] for key, p in parameters.items() if key.endswith(TABLE)} == (
        {tables} if tables else set()
    )
    assert model.no_weight_decay() == {key for key in parameters if key.endswith(TABLE)}


def test_every_odd_block_is_shifted():
    """A token's influence ends at its window, which is shifted in an odd block."""
    model = little("softmax_swin_tiny", mixer_options={"window": {"window_size": 4}})
    for block, rows in ((0, set(range(4, 8))), (1, set(range(6, 10)))):
        mixer = model.stages[1].blocks[block].mixer
        x = torch.randn(1, 144, 32)
        other = x.clone()
        other[0, 7 * 12 + 7] += 1
        with torch.inference_mode():
            context = Context((12, 12))
            changed = (mixer(x, context) - mixer(other, context)).abs().sum(-1).view(12, 12) > 0
        assert {i for i in range(12) if changed[i].any()} == rows
        assert {i for i in range(12) if changed[:, i].any()} == rows
