"""The Pyramid Vision Transformer, version 1, and the mixers that its body holds."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch.export import Dim

from linsight.backbones.context import Context
from linsight.backbones.initialization import shapes_only
from linsight.backbones.mixers import MIXERS

from .conftest import lively

# A PVT that is small enough for tests.
NANO = {
    "embed_dim": (16, 32, 32, 64),
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 2, 2, 4),
    "mlp_ratios": (2, 2, 2, 2),
    "num_classes": 5,
}


def nano(name="softmax_pvt_tiny", **kwargs):
    return timm.create_model(name, **NANO | kwargs)


@pytest.mark.parametrize("name", ["softmax_pvt_tiny", "agent_pvt_tiny"])
@pytest.mark.parametrize("size", [(64, 64), (32, 96), (50, 77)])
def test_any_size(name, size):
    model = lively(nano(name))
    x = torch.randn(2, 3, *size)
    height, width = (-(-side // 32) for side in size)
    shape = (2, height, width, 64) if name == "agent_pvt_tiny" else (2, 1 + height * width, 64)
    with torch.inference_mode():
        features, maps = model.forward_intermediates(x)
        assert features.shape == shape
        assert torch.equal(features, model.forward_features(x))
        assert [m.shape[2:] for m in maps] == [
            tuple(-(-side // 2**i) for side in size) for i in (2, 3, 4, 5)
        ]
        # No statistic is taken over several images.
        torch.testing.assert_close(model(x), torch.cat([model(i[None]) for i in x]))


MAPS_ONLY = {
    "care",
    "cross_window",
    "factorized",
    "large_kernel",
    "local_window",
    "mhla",
    "softmax_free",
    "spatial_reduction",
    "window",
}
PLACES = [(mixer, False) for mixer in sorted(set(MIXERS) - {"spatial_reduction"})]
PLACES += [(mixer, True) for mixer in sorted(set(MIXERS) - MAPS_ONLY)]


@pytest.mark.parametrize(("mixer", "class_token"), PLACES)
def test_every_mixer_trains(mixer, class_token):
    # One head cannot be shared by the two directions of stripes.
    options = {"cross_window": {"split_size": (None, 2, 2, 2)}}
    model = nano(mixer=mixer, img_size=64, class_token=class_token, mixer_options=options)
    model.forward_features(torch.randn(2, 3, 64, 64)).square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert missing == ["head.fc.weight", "head.fc.bias"]


@pytest.mark.parametrize("mixer", sorted(MAPS_ONLY - {"spatial_reduction"}))
def test_a_mixer_of_maps_alone_is_refused_beside_a_class_token(mixer):
    with pytest.raises(ValueError, match="1 class tokens"):
        nano(mixer=["softmax"] * 3 + [mixer], img_size=64, class_token=True)


def test_spatial_reduction_trains_where_there_is_no_class_token():
    options = {"spatial_reduction": {"reduction": 2}}
    model = nano(mixer="spatial_reduction", img_size=64, class_token=False, mixer_options=options)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="take another mixer for this stage"):
        nano(mixer="spatial_reduction", mixer_options=options)
    with pytest.raises(ValueError, match="reduction is 1, expected at least 2"):
        nano(mixer="spatial_reduction", class_token=False)


def test_an_option_leaves_the_others_as_they_are():
    grids = ((12, 12), (16, 16), 28, 28)
    with shapes_only():
        model = timm.create_model("agent_pvt_tiny", mixer_options={"agent": {"agent_grid": grids}})
    mixers = [stage.blocks[0].mixer.attention for stage in model.stages]
    assert [m.table_grid for m in mixers] == [(3, 3), (4, 4), (7, 7), (7, 7)]
    assert [m.grid for m in mixers] == [(12, 12), (16, 16), (28, 28), (28, 28)]


def test_reduction_by_hand():
    """With 2 x 2 tokens, one head and a convolution that averages, there is one key."""
    mixer = nano().stages[2].blocks[0].mixer.double().eval()
    mixer.num_heads = 1
    x = torch.randn(1, 4, 32, dtype=torch.float64)
    with torch.no_grad():
        mixer.reduce.weight.zero_()
        mixer.reduce.weight[range(32), range(32)] = 0.25
        mixer.reduce.bias.zero_()
        got = mixer(x, Context((2, 2)))
        value = mixer.key_value(mixer.norm(x.mean(1, keepdim=True)))[..., 32:]
        torch.testing.assert_close(got, mixer.out_proj(value).expand(-1, 4, -1))


def test_the_class_token_is_what_the_head_reads():
    model = lively(nano())
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        features = model.forward_features(x)
        assert torch.equal(model.forward_head(features), model.head.fc(features[:, 0]))
        normed = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
        assert torch.equal(normed[0].permute(0, 2, 3, 1).flatten(1, 2), features[:, 1:])
        assert nano(global_pool="avg", num_classes=0)(x).shape == (1, 64)
        assert nano(class_token=False, global_pool="", num_classes=0)(x).shape == (1, 2, 2, 64)


def test_features():
    backbone = nano(features_only=True, out_indices=(1, 3))
    maps = backbone(torch.randn(1, 3, 96, 64))
    assert [tuple(m.shape) for m in maps] == [(1, 32, 12, 8), (1, 64, 3, 2)]
    assert backbone.feature_info.reduction() == [8, 32]


@pytest.mark.parametrize("name", ["softmax_pvt_tiny", "agent_pvt_tiny"])
def test_loading_at_another_size(name, tmp_path):
    """Weights that are loaded at another size give what the model computes at that size."""
    model = lively(nano(name, img_size=64))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth"), "num_classes": 5}
    x = torch.randn(1, 3, 128, 128)
    larger = nano(name, img_size=128, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    shapes = {n: p.shape for n, p in larger.state_dict().items()}
    assert shapes != {n: p.shape for n, p in model.state_dict().items()}
    with torch.inference_mode():
        torch.testing.assert_close(larger.stages[0].cls_token, model.stages[0].cls_token)
        if name == "agent_pvt_tiny":
            for stage, other in zip(larger.stages, model.stages, strict=True):
                mine, theirs = (s.blocks[0].mixer.attention for s in (stage, other))
                torch.testing.assert_close(mine.biases(mine.size), theirs.biases(mine.size))
    assert larger(x).shape == (1, 5)


def test_another_models_weights_are_refused(tmp_path):
    torch.save(nano("agent_pvt_tiny").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"not of softmax_pvt_tiny: .* missing .* unexpected"):
        nano(pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "w.pth")})


def test_weight_decay_as_the_authors():
    """The class token does not decay; position embeddings and agents' tables do."""
    model = nano(mixer="agent")
    kept, decayed = param_groups_weight_decay(
        model, 0.05, no_weight_decay_list=model.no_weight_decay()
    )
    kept, decayed = ({id(p) for p in group["params"]} for group in (kept, decayed))
    parameters = dict(model.named_parameters())
    assert id(parameters["stages.3.cls_token"]) in kept
    kinds = ("pos_embed", "map_bias", "row_bias", "column_bias", "prefix_bias")
    positions = [p for n, p in parameters.items() if n.endswith(kinds)]
    assert len(positions) == 4 + 13
    assert {id(p) for p in positions} <= decayed


def test_layer_decay_grows_with_depth():
    model = nano()
    groups = param_groups_layer_decay(model, 0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    names = ["stem.proj.weight"]
    names += [f"stages.{s}.blocks.0.mlp.fc1.weight" for s in range(4)] + ["head.fc.weight"]
    scales = [scale[id(parameters[name])] for name in names]
    assert scales == sorted(set(scales))
    assert scale[id(parameters["stages.1.pos_embed"])] == scales[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax_pvt_tiny", "agent_pvt_tiny"])
def test_export(name):
    model = lively(nano(name))
    shapes = (
        {
            0: Dim("batch", min=1, max=64),
            2: Dim("height", min=65, max=2048),
            3: Dim("width", min=65, max=2048),
        },
    )
    program = torch.export.export(model, (torch.randn(2, 3, 96, 128),), dynamic_shapes=shapes)
    with torch.inference_mode():
        for batch, height, width in ((2, 128, 128), (1, 65, 96), (3, 97, 131)):
            x = torch.randn(batch, 3, height, width)
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)
