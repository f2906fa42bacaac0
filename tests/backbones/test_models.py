"""The contract of a backbone: what a user of timm may ask of a model."""

import copy
import re

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import DropPath
from timm.models import create_feature_extractor, get_notrace_functions, get_notrace_modules
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import get_graph_node_names

from linsight.backbones import ZOO
from linsight.backbones.initialization import shapes_only
from linsight.backbones.layers import BatchNormAct2d, ConvNormAct, synchronize_batch_norms
from linsight.backbones.mixers import MIXERS
from linsight.backbones.mixers.window import WindowAttention
from linsight.kernels import force

from .conftest import lively

# One model of each skeleton, in a size that is small enough for tests.
LITTLE = {
    "rala_vit_nano": {},
    "soft_vit_nano": {},
    "softmax_deit_tiny": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "softmax_pvt_tiny": {"embed_dim": (16, 32, 40, 64), "depths": (1, 1, 1, 1)},
    "softmax_pvtv2_b0": {"embed_dim": (16, 32, 40, 64), "depths": (1, 1, 1, 1)},
    "softmax_swin_tiny": {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 4, 4)},
}


# tests/tools/test_zoo.py counts those that have no weights and whose paper tests at 224 px.
COUNTED = [
    pytest.param(name, marks=[] if row.released or row.top1_size != 224 else pytest.mark.slow)
    for name, row in ZOO.items()
    if row.parameters
]


@pytest.mark.parametrize("name", COUNTED)
def test_parameter_counts_are_the_authors(name):
    tags = list(ZOO[name].released)[:1]
    with shapes_only():
        model = timm.create_model(".".join([name, *tags]))
    assert sum(p.numel() for p in model.parameters()) == ZOO[name].parameters


# Their sides in pixels, parameters in millions as published, crop, and how images are resized.
LARGER = [
    ("agent_deit_small.in1k_448", 448, 23.1, 0.875, "squash"),
    ("agent_pvt_medium.in1k_256", 256, 36.1, 0.875, "squash"),
    ("agent_swin_small.in1k_288", 288, 50, 1.0, "squash"),
    ("agent_swin_base.in1k_384", 384, 88, 1.0, "squash"),
    ("agent_cswin_base.in1k_384", 384, 73, 0.875, "squash"),
    ("flatten_swin_base.in1k_384", 384, 91, 1.0, "squash"),
    ("flatten_cswin_base.in1k_384", 384, 78, 0.875, "squash"),
    ("inline_deit_small.in1k_288", 288, 16.7, 0.875, "squash"),
    ("inline_deit_base.in1k_448", 448, 23.8, 0.875, "squash"),
    ("inline_swin_base.in1k_384", 384, 88, 1.0, "squash"),
    ("inline_cswin_base.in1k_384", 384, 73, 0.875, "squash"),
    ("pola_swin_base.in1k_384", 384, 91.6, 1.0, "squash"),
    ("l2vit_base.in22k_ft_in1k_384", 384, 89, 1.0, "squash"),
    ("softmax_deit_base.fb_in1k_384", 384, 86.9, 1.0, "center"),
    ("softmax_swin_large.ms_in22k_ft_in1k_384", 384, 197, 1.0, "center"),
    ("softmax_cswin_large.ms_in22k_ft_in1k_384", 384, 173, 1.0, "center"),
]


@pytest.mark.parametrize(("name", "size", "millions", "crop", "mode"), LARGER)
def test_a_tag_of_another_size_brings_what_the_size_needs(name, size, millions, crop, mode):
    with shapes_only():
        model = timm.create_model(name)
    unit = 0.1 if millions % 1 else 1
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    assert parameters == pytest.approx(millions, abs=0.51 * unit)
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, size, size)
    assert (data["crop_pct"], data["crop_mode"]) == (crop, mode)
    windows = {m.window_size for m in model.modules() if isinstance(m, WindowAttention)}
    assert windows <= {size // 32}


@pytest.mark.parametrize("name", [name for name in ZOO if name.endswith("_nano")])
def test_nano_is_small(name):
    with shapes_only():
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) <= 2_000_000


ALL_LINEAR = [name for name in ZOO if name.endswith("_linear")]


@pytest.mark.parametrize(
    "name",
    [n if "_tiny_" in n else pytest.param(n, marks=pytest.mark.slow) for n in ALL_LINEAR],
)
def test_an_all_linear_model_costs_with_its_pixels(name):
    """So many times the pixels are as many times the operations, without the classifier's."""
    costs = []
    with torch.device("meta"), force("triton"):
        with shapes_only():
            model = timm.create_model(name, num_classes=0).requires_grad_(False)
        for height, width in ((224, 224), (448, 896), (4096, 8192)):
            with FlopCounterMode(display=False) as counter:
                assert model(torch.empty(1, 3, height, width)).shape == (1, model.head_hidden_size)
            costs.append(counter.get_total_flops())
    assert costs[1] == pytest.approx(8 * costs[0], rel=1e-3)
    assert costs[2] == pytest.approx(4096 * 8192 / 224**2 * costs[0], rel=1e-3)


@pytest.mark.parametrize("name", [name for name in ALL_LINEAR if "_tiny_" in name])
@pytest.mark.parametrize("size", [(224, 224), (96, 1056), (500, 333)])
def test_an_all_linear_model_runs_at_any_size(name, size):
    model = lively(timm.create_model(name, num_classes=5))
    with torch.inference_mode():
        features = model.forward_features(torch.randn(1, 3, *size))
        assert features.shape == (1, *(-(-side // 32) for side in size), 512)
        assert model.forward_head(features).isfinite().all()


def test_a_papers_weights_are_a_start_for_the_all_linear_model():
    with shapes_only():
        theirs, ours = (timm.create_model(f"mala_vit_small{end}") for end in ("", "_linear"))
    shapes = [{n: p.shape for n, p in m.state_dict().items()} for m in (theirs, ours)]
    assert shapes[0] == shapes[1]


@settings(max_examples=15, deadline=None)
@given(height=st.integers(32, 140), width=st.integers(32, 140), batch=st.integers(1, 3))
def test_any_size(height, width, batch):
    model = timm.create_model("rala_vit_nano", num_classes=7).eval()
    with torch.inference_mode():
        features = model.forward_features(torch.randn(batch, 3, height, width))
        assert features.shape == (batch, -(-height // 32), -(-width // 32), 192)
        assert model.forward_head(features).shape == (batch, 7)


def test_a_batch_is_its_images(nano):
    """In evaluation, no statistic is taken over several images."""
    x = torch.randn(3, 3, 64, 96)
    with torch.inference_mode():
        torch.testing.assert_close(nano(x), torch.cat([nano(i[None]) for i in x]))


@pytest.mark.parametrize("shape", [(1, 3, 31, 64), (1, 3, 64, 8), (1, 4, 64, 64), (3, 64, 64)])
def test_an_impossible_image_is_refused(nano, shape):
    with pytest.raises(ValueError, match=r"images (are|have shape)"):
        nano(torch.randn(shape))


def test_img_size_is_checked():
    timm.create_model("rala_vit_nano", img_size=(64, 96))
    with pytest.raises(ValueError, match="img_size is 16"):
        timm.create_model("rala_vit_nano", img_size=16)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_stands_in_the_pyramid(mixer):
    # The first stage has one head, which the two directions of stripes cannot share.
    options = {"cross_window": {"split_size": (None, 2, 2, 2)}}
    model = timm.create_model("rala_vit_nano", mixer=mixer, mixer_options=options, num_classes=3)
    model(torch.randn(2, 3, 32, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_an_unknown_mixer_names_its_neighbours():
    with pytest.raises(ValueError, match="did you mean rala"):
        timm.create_model("rala_vit_nano", mixer="ralla")


def test_features(nano):
    backbone = timm.create_model("rala_vit_nano", features_only=True, out_indices=(1, 3))
    maps = backbone(torch.randn(1, 3, 96, 64))
    assert [tuple(m.shape) for m in maps] == [(1, 64, 12, 8), (1, 192, 3, 2)]
    assert backbone.feature_info.channels() == [64, 192]
    assert backbone.feature_info.reduction() == [8, 32]
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        final, stages = nano.forward_intermediates(x, output_fmt="NHWC")
        assert torch.equal(final, nano.forward_features(x))
        assert torch.equal(stages[3], final)
        early = nano.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
        assert torch.equal(early[0].permute(0, 2, 3, 1), stages[0])


@pytest.mark.parametrize("name", LITTLE)
def test_gradient_checkpointing_changes_nothing(name):
    """Outputs and gradients stay as they are; a block only runs again, in the backward pass."""
    model = lively(timm.create_model(name, num_classes=5, **LITTLE[name]))
    block = next(part for name, part in model.named_modules() if name.endswith("blocks.0"))
    runs = []
    block.register_forward_pre_hook(lambda *_: runs.append(block))
    x = torch.randn(2, 3, 64, 64)
    model(x).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], plain)
    assert len(runs) == 3


def test_weight_decay_as_the_authors(nano):
    """Vectors and biases do not decay; layer scales, of rank 4, do."""
    kept, decayed = param_groups_weight_decay(nano, 0.05)
    assert kept["weight_decay"] == 0
    assert all(p.ndim <= 1 for p in kept["params"])
    scales = {id(p) for name, p in nano.named_parameters() if "gamma" in name}
    assert scales <= {id(p) for p in decayed["params"]}


def test_layer_decay_grows_with_depth(nano):
    groups = param_groups_layer_decay(nano, 0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    names = ["stem.0.conv.weight"]
    names += [f"stages.{s}.blocks.0.mlp.fc1.weight" for s in range(4)] + ["head.fc.weight"]
    parameters = dict(nano.named_parameters())
    scales = [scale[id(parameters[name])] for name in names]
    assert scales == sorted(scales)
    assert len(set(scales)) == 6
    # The downsampling is part of the block after it.
    assert scale[id(parameters["stages.1.downsample.conv.weight"])] == scales[2]


def test_drop_path_grows_linearly():
    model = timm.create_model("rala_vit_tiny", drop_path_rate=0.11)
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for s in model.stages for b in s.blocks]
    assert rates == pytest.approx([0.11 * i / 11 for i in range(12)])


@pytest.mark.parametrize(
    "name", ["rala_vit_nano", "softmax_swin_tiny", "van_b0", "care_s0", "l2vit_tiny"]
)
def test_stochastic_depth_is_that_of_timms_module(name, monkeypatch):
    """The residual sums multiply by its factors; a module with a hook multiplies the branch."""
    options = LITTLE.get(name, {}) | ({"img_size": 32} if "swin" in name else {})
    model = timm.create_model(name, num_classes=3, drop_path_rate=0.5, **options).double()
    copied = copy.deepcopy(model)
    drops = [part for part in copied.modules() if isinstance(part, DropPath)]
    seen = []
    for part in drops:
        part.register_forward_hook(lambda _, args, output: seen.append(args[0].shape))
    called = []
    plain = DropPath.forward

    def forward(self, x):
        called.append(x.shape)
        return plain(self, x)

    monkeypatch.setattr(DropPath, "forward", forward)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    outcomes = []
    for each in (model, copied):
        torch.manual_seed(1)
        logits = each.train()(images)
        gradients = torch.autograd.grad(logits.square().sum(), each.parameters(), allow_unused=True)
        outcomes.append([logits, *(g for g in gradients if g is not None)])
    torch.testing.assert_close(*outcomes)
    # All of them are called; one whose branch a convolution adds gets the branch.
    assert len(called) == 2 * len(drops)
    assert called[len(drops) :] == seen
    ones = [shape for shape in called[: len(drops)] if shape.numel() == 3]
    assert len(ones) >= len(drops) // 2
    torch.manual_seed(1)
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_initial_weights_of_nalaformer_are_the_authors():
    """Linear layers have PyTorch's initialisation, convolutions and the classifier do not."""
    model = timm.create_model("nala_vit_xtiny")
    block = model.stages[2].blocks[0]
    for layer in (block.mixer.in_proj, block.mlp.fc1, model.head.projection):
        bound = layer.in_features**-0.5
        assert layer.weight.abs().max().item() == pytest.approx(bound, rel=0.05)
        assert layer.bias.any()
    convolutions = (model.stem[1].conv.weight, block.position2.weight, block.mlp.depthwise.weight)
    for weight in (*convolutions, block.mixer.attention.local_weight, model.head.fc.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(nano, dtype):
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        wanted = nano(x)
        got = nano.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    assert (got - wanted).norm() / wanted.norm() < (1e-5 if dtype == torch.float64 else 3e-2)


def test_every_row_says_where_its_paper_is():
    papers = {model.family.paper for model in ZOO.values()}
    assert all(re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv) for paper in papers)


class TestCheckpoints:
    """A checkpoint belongs to the model that loads it, or the message says what is wrong."""

    @staticmethod
    def load(path, name="rala_vit_nano", **kwargs):
        return timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs
        )

    def test_our_own(self, nano, tmp_path):
        torch.save(nano.state_dict(), tmp_path / "w.pth")
        overlay = {"file": str(tmp_path / "w.pth"), "num_classes": 10}
        model = timm.create_model(
            "rala_vit_nano", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10
        )
        x = torch.randn(1, 3, 64, 64)
        assert torch.equal(model.eval()(x), nano(x))

    def test_other_classes_and_channels(self, nano, tmp_path):
        torch.save(nano.state_dict(), tmp_path / "w.pth")
        model = self.load(tmp_path / "w.pth", num_classes=4, in_chans=1)
        assert model(torch.randn(2, 1, 64, 64)).shape == (2, 4)
        assert torch.equal(
            model.stages[2].blocks[0].mixer.in_proj.weight,
            nano.stages[2].blocks[0].mixer.in_proj.weight,
        )

    def test_checkpoint_path_of_timm(self, nano, tmp_path):
        """timm loads it after the model is made, without a filter and for the same classes."""
        state = nano.state_dict()
        average = {"ema": {"module": {f"_orig_mod.{k}": v for k, v in state.items()}}, "epoch": 1}
        for content in ({"model": state}, average):
            torch.save(content, tmp_path / "w.pth")
            path = str(tmp_path / "w.pth")
            model = timm.create_model("rala_vit_nano", num_classes=10, checkpoint_path=path)
            assert torch.equal(model.head.fc.weight, nano.head.fc.weight)
        with pytest.raises(
            RuntimeError, match=r"for 10 classes and the model has 4: .*, num_classes=10\)\)"
        ):
            timm.create_model("rala_vit_nano", num_classes=4, checkpoint_path=path)

    def test_checkpoint_path_of_the_authors(self, tmp_path):
        theirs = timm.create_model("deit_tiny_patch16_224", depth=1).eval()
        torch.save({"model": theirs.state_dict()}, tmp_path / "w.pth")
        path = str(tmp_path / "w.pth")
        model = timm.create_model("softmax_deit_tiny", depth=1, checkpoint_path=path).eval()
        x = torch.randn(1, 3, 224, 224)
        torch.testing.assert_close(model(x), theirs(x))

    def test_another_models(self, tmp_path):
        torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "w.pth")
        with pytest.raises(ValueError, match=r"not of rala_vit_nano: .* missing .* unexpected"):
            self.load(tmp_path / "w.pth")

    def test_another_size(self, nano, tmp_path):
        torch.save(nano.state_dict(), tmp_path / "w.pth")
        with pytest.raises(ValueError, match="not of rala_vit_tiny"):
            self.load(tmp_path / "w.pth", "rala_vit_tiny")

    def test_truncated(self, nano, tmp_path):
        torch.save(nano.state_dict(), tmp_path / "w.pth")
        whole = (tmp_path / "w.pth").read_bytes()
        (tmp_path / "w.pth").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(RuntimeError, match="zip archive"):
            self.load(tmp_path / "w.pth")

    def test_code_is_never_run(self, tmp_path):
        class Malicious:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        torch.save({"model": Malicious()}, tmp_path / "w.pth")
        with pytest.raises(RuntimeError, match="weights_only"):
            self.load(tmp_path / "w.pth")
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("act_layer", [None, torch.nn.GELU, torch.nn.ReLU, torch.nn.SiLU])
def test_a_batch_norm_joins_its_convolution(act_layer):
    layer = ConvNormAct(3, 5, 3, stride=2, padding=1, act_layer=act_layer).double()
    for parameter in (*layer.parameters(), layer.norm.running_mean):
        torch.nn.init.normal_(parameter)
    torch.nn.init.uniform_(layer.norm.running_var, 0.5, 2)
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    layer.eval()
    norm = torch.nn.functional.batch_norm(
        layer.conv(x),
        layer.norm.running_mean,
        layer.norm.running_var,
        layer.norm.weight,
        layer.norm.bias,
    )
    wanted = norm if act_layer is None else act_layer()(norm)
    torch.testing.assert_close(layer(x), wanted)
    fused = layer.fuse()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fused.modules())
    torch.testing.assert_close(fused(x), wanted)
    # The activation of a replaced norm stays.
    layer.norm = torch.nn.Identity()
    conv = layer.conv(x)
    torch.testing.assert_close(layer(x), conv if act_layer is None else act_layer()(conv))
    assert layer.fuse() is layer


def test_batch_norms_share_statistics_on_request():
    """`BatchNormAct2d` stays in place; PyTorch's layers become its own synchronised ones."""
    model = timm.create_model("rala_vit_nano", num_classes=3)
    model = synchronize_batch_norms(model)
    norms = [m for m in model.modules() if isinstance(m, BatchNormAct2d)]
    assert len(norms) == 4 + 3
    assert all(norm.synchronized for norm in norms)
    assert isinstance(model.head.norm, torch.nn.SyncBatchNorm)
    assert model(torch.randn(2, 3, 64, 64)).isfinite().all()


def old_name(name):
    """The name that version 0.1 gave to a weight."""
    name = re.sub(
        r"^stem\.(\d+)\.(conv|norm)\.",
        lambda m: f"stem.{3 * int(m[1]) + ('conv', 'norm').index(m[2])}.",
        name,
    )
    name = name.replace("attention.local_", "local.").replace("mixer.attention.", "mixer.")
    return re.sub(r"(stages\.\d\.downsample)\.(?=conv|norm)", r"\1.0.", name)


def test_pytorchs_batch_norms_stay_without_a_gpu():
    """PyTorch's `SyncBatchNorm` needs one."""
    model = torch.nn.Sequential(BatchNormAct2d(4), torch.nn.BatchNorm2d(4))
    synchronize_batch_norms(model, convert=False)
    assert model[0].synchronized
    assert type(model[1]) is torch.nn.BatchNorm2d


@pytest.mark.parametrize("way", ["load_state_dict", "create_model"])
@pytest.mark.parametrize("name", ["mala_vit_nano", "soft_vit_nano", "agent_deit_tiny"])
def test_weights_of_version_0_1_load(name, way, tmp_path, caplog):
    options = {"img_size": 64, "num_classes": 1000, **LITTLE.get(name, {})}
    model = lively(timm.create_model(name, **options))
    weights = model.state_dict()
    if name == "soft_vit_nano":
        old = {old_name(key): value for key, value in weights.items()}
    else:
        # In the models of RAVLT and MAViT, the downsampling already had today's names.
        old = {
            old_name(key).replace("downsample.0.", "downsample."): v for key, v in weights.items()
        }
    assert old.keys() != weights.keys()
    old = {k: v.unflatten(-1, (7, 7)) if k.endswith("map_bias") else v for k, v in old.items()}
    other = timm.create_model(name, **options)
    if way == "load_state_dict":
        other.load_state_dict(old)
    else:
        torch.save(old, tmp_path / "w.pth")
        overlay = {"file": str(tmp_path / "w.pth")}
        other = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    assert "linsight 0.1" in caplog.text
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(other.eval()(x), model(x))


@pytest.mark.parametrize("name", ["rala_vit_nano", "mala_vit_nano", "nala_vit_xtiny"])
def test_a_branch_left_to_the_next_block_changes_nothing(name):
    """Without gradients blocks leave their last branch to the next; a hook sees whole outputs."""
    model = lively(timm.create_model(name, num_classes=5))
    blocks = [block for stage in model.stages for block in stage.blocks]
    x = torch.randn(2, 3, 64, 96)
    seen = []

    def keep(module, inputs, output):
        seen.append(output)

    hooks = [block.register_forward_hook(keep) for block in blocks]
    wanted = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted)
        torch.testing.assert_close(seen[: len(blocks)], seen[len(blocks) :])
        for hook in hooks:
            hook.remove()
        calls = []
        blocks[-2].position.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
        torch.testing.assert_close(model(x), wanted)
    assert len(blocks) > len(calls) == 1


TRACED = ("rala_vit_nano", "agent_deit_tiny", "softmax_pvt_tiny", "softmax_swin_tiny")


@pytest.mark.parametrize(
    "name",
    [*TRACED, "softmax_cswin_tiny", "soft_vit_nano", "softmax_pvtv2_b0", "nala_vit_xtiny"],
)
def test_features_through_fx(name):
    """torch.fx traces a model, as timm's create_feature_extractor and torchvision do."""
    model = timm.create_model(name, num_classes=5, img_size=64).eval()
    options = {
        "leaf_modules": get_notrace_modules(),
        "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }
    *_, last = get_graph_node_names(model, tracer_kwargs=options)[1]
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(create_feature_extractor(model, [last])(x)[last], model(x))
