"""SOFT's and SOFT-Norm's models: their body, and their mixer in it and in other bodies."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch.export import Dim

from linsight.backbones.context import Context, Place
from linsight.backbones.initialization import shapes_only
from linsight.backbones.mixers import build_mixer
from linsight.backbones.mixers.softmax_free import SoftmaxFree
from linsight.tools.models import read_counts

from .conftest import lively

SIZES = [(32, 32), (97, 64), (224, 160)]


@pytest.fixture
def soft():
    return lively(timm.create_model("soft_vit_nano", num_classes=10))


def relative(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_any_size(soft, height, width):
    with torch.inference_mode():
        features, stages = soft.forward_intermediates(torch.randn(2, 3, height, width))
        normed = soft.norm(stages[-1].flatten(2).mT)
    for stage, reduction in zip(stages, (4, 8, 16, 32), strict=True):
        assert stage.shape[2:] == (-(-height // reduction), -(-width // reduction))
    assert features.shape == (2, 1 + normed.shape[1], 128)
    torch.testing.assert_close(normed, features[:, 1:])


def test_img_size_is_another_resolution_of_the_same_model(soft, tmp_path):
    """Position embeddings that are interpolated at loading or at use give the same outputs."""
    torch.save(soft.state_dict(), tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth"), "num_classes": 10}
    model = timm.create_model(
        "soft_vit_nano",
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        num_classes=10,
        img_size=(96, 128),
    ).eval()
    assert model.stages[0].pos_embed.shape == (1, 24 * 32, 32)
    x = torch.randn(1, 3, 96, 128)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), soft(x))


def test_images_of_a_batch(soft):
    """SOFT's images are independent; SOFT-Norm's share the start of Newton's iteration."""
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    normalized = {"softmax_free": {"inverse": "normalized", "iterations": 3}}
    norm = lively(timm.create_model("soft_vit_nano", mixer_options=normalized))
    with torch.inference_mode():
        for model, same in ((soft, True), (norm, False)):
            model = model.double()
            alone = torch.cat([model(image[None]) for image in x])
            assert (relative(model(x), alone) < 1e-12) == same


def test_the_released_weights_choose_their_inverse():
    def inverses(name, **kwargs):
        with shapes_only():
            model = timm.create_model(name, **kwargs)
        return {block.mixer.inverse for stage in model.stages[:3] for block in stage.blocks}

    assert inverses("soft_vit_tiny") == {"regularized"}
    assert inverses("soft_vit_tiny.in1k_2021") == {"unregularized"}
    assert inverses("soft_norm_vit_tiny") == {"normalized"}
    given = {"softmax_free": {"inverse": "normalized"}}
    assert inverses("soft_vit_tiny.in1k_2021", mixer_options=given) == {"normalized"}
    assert timm.create_model("soft_vit_nano").pretrained_cfg["crop_pct"] == 0.9


@pytest.mark.parametrize(
    ("name", "published"),
    [("tiny", 1.9), ("small", 3.3), ("medium", 7.2), ("large", 11.0), ("huge", 16.3)],
)
def test_multiply_adds_are_the_published_but_for_the_inverse(name, published):
    model = timm.create_model(f"soft_vit_{name}")
    mixers = [m for m in model.modules() if isinstance(m, SoftmaxFree)]
    # Each of 20 iterations has two products of 49 x 49 matrices.
    inverses = sum(2 * m.iterations * m.num_heads * 49**3 for m in mixers)
    counted = read_counts()[f"soft_vit_{name}"][1]
    assert (counted - inverses) / 1e9 == pytest.approx(published, rel=0.03)


def test_initialisation_as_the_authors():
    deviations = {}
    for name in ("soft_vit_tiny", "soft_norm_vit_tiny"):
        model = timm.create_model(name)
        linear = model.stages[1].blocks[0].mlp.fc1
        deviations[name] = linear.weight.std().item()
        assert linear.bias.any() == (name == "soft_norm_vit_tiny")
        assert model.stages[3].blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, 0.1)
        landmark = model.stages[2].blocks[0].mixer.landmark.weight
        assert landmark.std().item() == pytest.approx((3 * landmark[0].numel()) ** -0.5, 0.1)
    assert deviations["soft_vit_tiny"] == pytest.approx(0.02, 0.1)
    assert deviations["soft_norm_vit_tiny"] == pytest.approx((3 * 128) ** -0.5, 0.1)


def test_drop_rates():
    """Stages before the last have an ordinary dropout, the last has stochastic depth."""
    model = timm.create_model("soft_vit_tiny", drop_path_rate=0.14)
    blocks = [block for stage in model.stages for block in stage.blocks]
    rates = [block.drop1.p for block in blocks[:6]]
    rates += [block.drop_path1.drop_prob for block in blocks[6:]]
    assert rates == pytest.approx([0.02 * i for i in range(8)])


def test_weight_decay_as_the_authors(soft):
    kept, decayed = param_groups_weight_decay(
        soft, 0.05, no_weight_decay_list=soft.no_weight_decay()
    )
    names = {id(p): name for name, p in soft.named_parameters()}
    matrices = {names[id(p)] for p in kept["params"] if p.ndim > 1}
    assert matrices == {"stages.3.cls_token"}
    assert {f"stages.{i}.pos_embed" for i in range(4)} <= {names[id(p)] for p in decayed["params"]}


def test_layer_decay_grows_with_depth(soft):
    groups = param_groups_layer_decay(soft, 0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    parameters = dict(soft.named_parameters())
    names = ["stem.0.conv.weight"]
    names += [f"stages.{s}.blocks.0.mlp.fc1.weight" for s in range(4)] + ["head.fc.weight"]
    scales = [scale[id(parameters[name])] for name in names]
    assert scales == sorted(scales)
    assert len(set(scales)) == 6


def few_blocks():
    """A block of each mixer, because tracing takes long."""
    options = {"softmax_free": {"iterations": 2}}
    return lively(timm.create_model("soft_vit_nano", depths=(1, 0, 0, 1), mixer_options=options))


def test_one_graph_at_any_size():
    model = few_blocks()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.inference_mode():
        for height, width in ((64, 96), (97, 131)):
            x = torch.randn(1, 3, height, width)
            assert relative(compiled(x), model(x)) < 1e-5


@pytest.mark.slow
def test_export():
    soft = few_blocks()
    side = {"min": 65, "max": 4096}
    shapes = ({2: Dim("height", **side), 3: Dim("width", **side)},)
    program = torch.export.export(soft, (torch.randn(1, 3, 96, 128),), dynamic_shapes=shapes)
    with torch.inference_mode():
        for height, width in ((97, 65), (160, 224)):
            x = torch.randn(1, 3, height, width)
            assert relative(program.module()(x), soft(x)) < 1e-6


def test_bfloat16_autocast(soft):
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        got = soft(x)
    with torch.inference_mode():
        assert relative(got.float(), soft(x)) < 0.05


def test_another_mixer_in_the_skeleton():
    for mixer in ("softmax", ("softmax_free", "mala", "softmax_free", "softmax")):
        model = timm.create_model("soft_vit_nano", mixer=mixer, num_classes=3)
        model(torch.randn(2, 3, 64, 64)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_the_mixer_elsewhere():
    mixer = build_mixer("softmax_free", Place(64, 2, (28, 28)))
    assert mixer.ratio == 4
    assert build_mixer("softmax_free", Place(64, 2, (6, 6))).ratio == 1
    x = torch.randn(1, 9 * 12, 64)
    assert mixer(x, Context((9, 12))).shape == x.shape
    with pytest.raises(ValueError, match="3 x 12 holds no landmark of 4 x 4 pixels"):
        mixer(x[:, :36], Context((3, 12)))
    with pytest.raises(ValueError, match="1 class tokens stand before the map"):
        timm.create_model("soft_vit_nano", mixer="softmax_free")


def test_reset_classifier_refuses_an_unknown_pooling(soft):
    soft.reset_classifier(3, "avg")
    assert soft(torch.randn(2, 3, 64, 64)).shape == (2, 3)
    with pytest.raises(ValueError, match="global_pool is 'mean'"):
        soft.reset_classifier(3, "mean")


def test_a_checkpoint_of_another_model_is_refused(soft, tmp_path):
    torch.save(soft.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="not of soft_vit_tiny"):
        timm.create_model(
            "soft_vit_tiny",
            pretrained=True,
            pretrained_cfg_overlay={"file": str(tmp_path / "w.pth")},
        )
