"""The plain Vision Transformer: DeiT, and the mixers that its body holds."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch.export import Dim

from linsight.backbones.initialization import shapes_only
from linsight.backbones.mixers import MIXERS
from linsight.backbones.skeletons.vit import checkpoint_filter_fn

from .conftest import lively

# A DeiT that is small enough for tests, with two blocks of two heads.
NANO = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def nano(mixer="agent", **kwargs):
    return timm.create_model("softmax_deit_tiny", mixer=mixer, **NANO | kwargs)


def test_agent_base_has_agents_in_its_first_blocks():
    with shapes_only():
        model = timm.create_model("agent_deit_base")
    names = [type(block.mixer).__name__ for block in model.blocks]
    assert names == ["Agent"] * 4 + ["Softmax"] * 8
    assert model.blocks[0].mixer.attention.grid == (9, 9)


def test_it_is_timms_deit(tmp_path):
    """timm's weights load by the path that takes DeiT's own; both have one layout."""
    theirs = lively(timm.create_model("deit_tiny_patch16_224"))
    torch.save({"model": theirs.state_dict()}, tmp_path / "deit.pth")
    overlay = {"file": str(tmp_path / "deit.pth")}
    ours = timm.create_model("softmax_deit_tiny", pretrained=True, pretrained_cfg_overlay=overlay)
    x = torch.randn(2, 3, 224, 224, requires_grad=True)
    y = torch.randn(2, 3, 224, 224).copy_(x.detach()).requires_grad_()
    wanted, got = theirs(x), ours.eval()(y)
    assert (got - wanted).norm() / wanted.norm() < 1e-5
    slope = torch.randn_like(wanted)
    wanted.backward(slope)
    got.backward(slope)
    assert (y.grad - x.grad).norm() / x.grad.norm() < 1e-5


def test_loading_at_another_size_is_timms(tmp_path):
    theirs = lively(timm.create_model("deit_tiny_patch16_224"))
    torch.save(theirs.state_dict(), tmp_path / "deit.pth")
    overlay = {"file": str(tmp_path / "deit.pth")}
    pair = [
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=160)
        for name in ("deit_tiny_patch16_224", "softmax_deit_tiny")
    ]
    x = torch.randn(1, 3, 160, 160)
    with torch.inference_mode():
        wanted, got = (model.eval()(x) for model in pair)
    assert (got - wanted).norm() / wanted.norm() < 1e-5


def test_agents_load_at_another_size(tmp_path):
    """Weights that are loaded at another size give what the model computes at that size."""
    model = lively(nano())
    torch.save(model.state_dict(), tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth"), "num_classes": 5}
    x = torch.randn(1, 3, 96, 160)
    larger = nano(img_size=(96, 160), pretrained=True, pretrained_cfg_overlay=overlay).eval()
    with torch.inference_mode():
        torch.testing.assert_close(larger(x), model(x))


@pytest.mark.parametrize("size", [(32, 32), (96, 64), (50, 77)])
def test_any_size(size):
    model = lively(nano())
    x = torch.randn(2, 3, *size)
    with torch.inference_mode():
        tokens = model.forward_features(x)
        assert tokens.shape == (2, 1 + -(-size[0] // 16) * -(-size[1] // 16), 32)
        assert model.forward_head(tokens).shape == (2, 5)
        # No statistic is taken over several images.
        torch.testing.assert_close(model(x), torch.cat([model(i[None]) for i in x]))


# These mixers take a map alone, without a class token.
MAPS_ONLY = {
    "care",
    "cross_window",
    "factorized",
    "large_kernel",
    "local_window",
    "window",
}


@pytest.mark.parametrize("mixer", sorted(MAPS_ONLY))
def test_a_mixer_of_maps_alone_is_refused(mixer):
    with pytest.raises(ValueError, match="1 class tokens"):
        nano(mixer, img_size=64)


@pytest.mark.parametrize("mixer", sorted(set(MIXERS) - MAPS_ONLY))
def test_every_other_mixer_trains(mixer):
    model = nano(mixer, img_size=64)
    # All tokens are pooled: the class token alone does not read what the last mixer gives others.
    model.forward_features(torch.randn(2, 3, 64, 64)).square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert missing == ["head.weight", "head.bias"]


def test_a_mixer_a_block_and_one_without_place():
    model = nano(["agent", "mala"])
    assert [type(b.mixer).__name__ for b in model.blocks] == ["Agent", "MagnitudeAware"]
    with pytest.raises(ValueError, match=r"1 class tokens .* take another mixer"):
        nano("care")
    with pytest.raises(ValueError, match="names 3 blocks of stage 0, which has 2"):
        nano(["agent", "mala", "rala"])


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"images have shape \(1, 1, 64, 64\)"):
        nano()(torch.randn(1, 1, 64, 64))
    with pytest.raises(ValueError, match="global_pool is 'mean'"):
        nano(global_pool="mean")
    with pytest.raises(ValueError, match="output_fmt is 'NHWC'"):
        nano().forward_intermediates(torch.randn(1, 3, 64, 64), output_fmt="NHWC")


def test_another_models_weights_are_refused(tmp_path):
    torch.save(nano().state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="not of softmax_deit_tiny"):
        timm.create_model(
            "softmax_deit_tiny",
            pretrained=True,
            pretrained_cfg_overlay={"file": str(tmp_path / "w.pth")},
        )


def test_intermediates():
    model = lively(nano())
    x = torch.randn(1, 3, 48, 64)
    with torch.inference_mode():
        final, maps = model.forward_intermediates(x, norm=True)
        assert torch.equal(final, model.forward_features(x))
        assert torch.equal(maps[-1].permute(0, 2, 3, 1).flatten(1, 2), final[:, 1:])
        ((tokens, prefix),) = model.forward_intermediates(
            x, 1, True, output_fmt="NLC", intermediates_only=True, norm=True
        )
        assert torch.equal(torch.cat((prefix, tokens), 1), final)
    pooled = {pool: nano(global_pool=pool, num_classes=0)(x).shape for pool in ("avg", "", "token")}
    assert pooled == {"avg": (1, 32), "": (1, 13, 32), "token": (1, 32)}


def test_weight_decay_as_the_authors():
    """Agents' tables decay; the class token and the position embeddings do not."""
    model = nano()
    kept, decayed = param_groups_weight_decay(
        model, 0.05, no_weight_decay_list=model.no_weight_decay()
    )
    kept, decayed = ({id(p) for p in group["params"]} for group in (kept, decayed))
    parameters = dict(model.named_parameters())
    assert {id(parameters[name]) for name in ("cls_token", "pos_embed")} <= kept
    kinds = ("map_bias", "row_bias", "column_bias", "prefix_bias")
    tables = [p for name, p in parameters.items() if name.endswith(kinds)]
    assert len(tables) == 8
    assert {id(p) for p in tables} <= decayed


def test_layer_decay_grows_with_depth():
    model = nano()
    groups = param_groups_layer_decay(model, 0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    names = ("pos_embed", "blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight", "head.weight")
    scales = [scale[id(parameters[name])] for name in names]
    assert scales == sorted(set(scales))


def test_drop_path_grows_linearly():
    model = timm.create_model("softmax_deit_tiny", drop_path_rate=0.11)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.11 * i / 11 for i in range(12)])


def test_one_graph_at_any_size():
    model = lively(nano(depth=1))
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    with torch.inference_mode():
        for size in ((97, 131), (64, 64), (48, 96)):
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_export():
    model = lively(nano(depth=1))
    shapes = (
        {
            0: Dim("batch", min=1, max=64),
            2: Dim("height", min=33, max=2048),
            3: Dim("width", min=33, max=2048),
        },
    )
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=shapes)
    exported = program.module()
    with torch.inference_mode():
        for batch, height, width in ((2, 64, 64), (1, 33, 96), (3, 97, 131)):
            x = torch.randn(batch, 3, height, width)
            torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-4)


class TestDistilled:
    @pytest.fixture
    def pair(self):
        theirs = lively(timm.create_model("deit_tiny_distilled_patch16_224", depth=2)).eval()
        ours = timm.create_model("softmax_deit_tiny_distilled", depth=2).eval()
        ours.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), ours))
        return ours, theirs

    def test_is_timms(self, pair):
        ours, theirs = pair
        x = torch.randn(2, 3, 224, 224)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        for model in pair:
            model.train().set_distilled_training()
        for got, wanted in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)

    def test_classifiers_are_replaced(self, pair):
        ours, _ = pair
        ours.reset_classifier(7)
        assert ours(torch.randn(1, 3, 96, 160)).shape == (1, 7)
        assert [layer.out_features for layer in ours.get_classifier()] == [7, 7]
        assert ours.no_weight_decay() >= {"cls_token", "dist_token", "pos_embed"}

    def test_another_pooling_is_refused(self):
        with pytest.raises(ValueError, match="global_pool is 'avg', but the two classifiers"):
            timm.create_model("softmax_deit_tiny_distilled", global_pool="avg")
