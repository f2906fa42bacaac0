from types import SimpleNamespace

import pytest
import timm
import torch
from mmengine.registry import MODELS

import linsight.heads  # noqa: F401  registers TimmBackbone
from linsight.backbones import graphs
from linsight.backbones.checkpoint import CheckpointError

IMAGES = torch.randn(2, 3, 64, 96)


def build(model_name: str = "rala_vit_nano", **options):
    return MODELS.build({"type": "TimmBackbone", "model_name": model_name, **options})


@pytest.mark.parametrize("model_name", ["rala_vit_nano", "resnet10t", "convnext_atto"])
def test_maps_are_the_models_own(model_name):
    torch.manual_seed(0)
    backbone = build(model_name, out_indices=(1, 3)).eval()
    whole = timm.create_model(model_name).eval()
    unexpected = whole.load_state_dict(backbone.model.state_dict(), strict=False)[1]
    assert not unexpected
    with torch.no_grad():
        expected = whole.forward_intermediates(IMAGES, indices=[1, 3], intermediates_only=True)
        found = backbone(IMAGES)
    for x, y, channels in zip(found, expected, backbone.out_channels, strict=True):
        torch.testing.assert_close(x, y)
        assert x.shape[1] == channels


def test_every_parameter_has_a_gradient():
    """A parameter that nothing trains would stop distributed training."""
    backbone = build(out_indices=(0, 1, 2), output_norm_eps=1e-5)
    sum(x.square().mean() for x in backbone(IMAGES)).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


def test_output_norms():
    backbone = build(output_norm_eps=1e-6)
    assert [norm.eps for norm in backbone.norms] == [1e-6] * 4
    for x in backbone(IMAGES):
        torch.testing.assert_close(x.mean(1), torch.zeros_like(x[:, 0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_name", ["rala_vit_nano", "resnet10t"])
def test_frozen_stages_stay_as_they_are(model_name):
    backbone = build(model_name, frozen_stages=1).train()
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=1.0)
    sum(x.square().mean() for x in backbone(IMAGES)).backward()
    optimizer.step()
    frozen = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    changed = {name for name, x in backbone.state_dict().items() if not x.equal(before[name])}
    stages = ("model.layer", "model.stages.")
    first = ("model.layer1.", "model.stages.0.")
    assert frozen == {
        name
        for name, _ in backbone.named_parameters()
        if name.startswith(first) or not name.startswith(stages)
    }
    assert changed
    # Neither weights nor running statistics may move.
    assert all(name.startswith(stages) and not name.startswith(first) for name in changed)


def test_norm_eval():
    backbone = build("resnet10t", norm_eval=True).train()
    assert backbone.model.layer1.training
    before = backbone.model.bn1.running_mean.clone()
    backbone(IMAGES)
    assert backbone.model.bn1.running_mean.equal(before)


@pytest.mark.parametrize("norm_layer", ["repbn", "prepbn"])
def test_norm_eval_of_a_norm_of_our_own(norm_layer):
    backbone = build(norm_layer=norm_layer, norm_eval=True).train()
    statistics = {name: value.clone() for name, value in backbone.named_buffers()}
    sum(x.square().mean() for x in backbone(IMAGES)).backward()
    assert any(name.endswith("running_var") for name in statistics)
    for name, value in backbone.named_buffers():
        assert value.equal(statistics[name]), name
    # Its weights are trained, and what does not run is not waited for.
    trained = {name: p.grad for name, p in backbone.named_parameters() if p.requires_grad}
    assert any(name.endswith("alpha") for name in trained)
    assert [name for name, gradient in trained.items() if gradient is None] == []


def test_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    gradients = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        backbone = build(with_cp=with_cp).train()
        sum(x.square().mean() for x in backbone(IMAGES)).backward()
        gradients.append([p.grad for p in backbone.parameters()])
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y)


def test_compiled_maps_are_the_same():
    torch.manual_seed(0)
    backbone = build("resnet10t").eval()
    compiled = build("resnet10t", compile={"backend": "eager"}).eval()
    compiled.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        for x, y in zip(compiled(IMAGES), backbone(IMAGES), strict=True):
            torch.testing.assert_close(x, y)


def test_drop_path_in_training_alone():
    backbone = build(drop_path_rate=0.9)
    rates = [m.drop_prob for m in backbone.modules() if hasattr(m, "drop_prob")]
    assert max(rates) == pytest.approx(0.9)
    with torch.no_grad():
        backbone.train()
        assert not torch.equal(backbone(IMAGES)[-1], backbone(IMAGES)[-1])
        backbone.eval()
        assert torch.equal(backbone(IMAGES)[-1], backbone(IMAGES)[-1])


def test_weights_of_the_hub(tmp_path, monkeypatch):
    """`pretrained=True` finds weights by a model's tag, here at an address without a network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    model = timm.create_model("rala_vit_nano")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    address = {"url": (tmp_path / "weights.pth").as_uri(), "hf_hub_id": None, "source": "url"}
    backbone = build(pretrained=True, pretrained_cfg_overlay=address)
    own = model.state_dict()
    assert all(x.equal(own[name]) for name, x in backbone.model.state_dict().items())


def test_weights_from_a_file(tmp_path):
    model = timm.create_model("rala_vit_nano")
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    backbone = build(checkpoint=tmp_path / "weights.pth")
    own = model.state_dict()
    assert all(x.equal(own[name]) for name, x in backbone.model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_indices": (0, 4)}, "out_indices is"),
        ({"out_indices": ()}, "out_indices is"),
        ({"frozen_stages": 5}, "frozen_stages is 5"),
        ({"drop_paths": 0.1}, "nearest are drop_path"),
        ({"init_cfg": {"type": "Pretrained"}}, "give a file of weights as checkpoint="),
        ({"model_name": "rala_vit_nan"}, "rala_vit_nano"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing\.pth"):
        build(checkpoint=tmp_path / "nothing.pth")


def test_weights_behind_a_page_are_named():
    with pytest.raises(
        CheckpointError, match=r"get them from https://\S+MAViT\S+: set .*pretrained"
    ):
        build("mala_vit_tiny", pretrained=True)


def test_cudnn_builds_no_attention_for_each_size(monkeypatch):
    """Images of changing sizes have kernels for any size; a recorded pass has one size."""
    x = torch.empty(0)
    stand = SimpleNamespace(is_cuda=True)
    plain, checkpointing = (build(with_cp=on) for on in (False, True))

    def may_build(backbone, images) -> bool:
        with backbone._choose_attention(images):
            return torch.backends.cuda.cudnn_sdp_enabled()

    assert may_build(plain, x)
    assert not may_build(plain, stand)
    assert may_build(checkpointing, stand)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(graphs._Graphs, "recording", True)
    assert may_build(plain, stand)
