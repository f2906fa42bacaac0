"""Linear layers of folded models, which oneDNN computes on a CPU in inference."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils.model import reparameterize_model
from torch import nn

from linsight.backbones.linear import Linear, fuse_linear
from linsight.kernels import force, linear

from .conftest import lively

needs_onednn = pytest.mark.skipif(not linear._HAS_ONEDNN, reason="an x86 CPU with oneDNN")


def folded_layer(bias=True):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(24, 40, bias=bias))
    fuse_linear(module)
    return module[0]


@pytest.fixture(scope="module")
def folded():
    model = timm.create_model("rala_vit_nano", num_classes=10, depths=(1, 0, 1, 0))
    return reparameterize_model(lively(model))


@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_what_it_did(bias):
    layer, x = folded_layer(bias), torch.randn(2, 7, 24)
    wanted = F.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)


def test_a_folded_model_has_it_everywhere_but_in_the_classifier(folded):
    layers = {name: type(m) for name, m in folded.named_modules() if isinstance(m, nn.Linear)}
    assert len(layers) == 10
    assert {name for name, kind in layers.items() if kind is not Linear} == set()


@needs_onednn
def test_onednn_computes_each_of_them(folded, monkeypatch):
    calls, product = [], linear._PRODUCT

    def count(x, weight, *args):
        calls.append(tuple(weight.shape))
        return product(x, weight, *args)

    monkeypatch.setattr(linear, "_PRODUCT", count)
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        got = folded(x)
        assert calls == [tuple(m.weight.shape) for m in folded.modules() if type(m) is Linear]
        with force("reference"):
            torch.testing.assert_close(got, folded(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_changed_weights_are_seen():
    layer, x = folded_layer(), torch.randn(5, 24)
    for change in (
        lambda: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}),
        lambda: layer.weight.mul_(3),
        lambda: layer.weight.data.add_(1),
        lambda: setattr(layer, "weight", nn.Parameter(-layer.weight)),
        lambda: layer.to(torch.float64).to(torch.float32).weight.neg_(),
        lambda: torch.optim.SGD([layer.bias], 1.0, weight_decay=0.5, foreach=False),
    ):
        layer(x)
        done = change()
        if isinstance(done, torch.optim.Optimizer):
            layer.bias.grad = torch.ones_like(layer.bias)
            done.step()
        wanted = F.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)


def test_gradients_after_folding(folded):
    model, x = copy.deepcopy(folded), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model(x)
    model(x).square().sum().backward()
    gradients = [m.weight.grad for m in model.modules() if type(m) is Linear]
    with force("reference"):
        model.zero_grad()
        model(x).square().sum().backward()
    for got, m in zip(gradients, (m for m in model.modules() if type(m) is Linear), strict=True):
        assert got.abs().sum() > 0
        torch.testing.assert_close(got, m.weight.grad)


@torch.no_grad()
def test_hooks_run_and_stay():
    module = nn.Sequential(nn.Linear(24, 40))
    seen = []
    module[0].register_forward_hook(lambda _, args, y: seen.append((args[0].shape, y.shape)))
    before = module[0]
    fuse_linear(module)
    assert module[0] is before
    module(torch.randn(5, 24))
    assert seen == [((5, 24), (5, 40))]


@torch.no_grad()
def test_copies_and_state(folded):
    x = torch.randn(1, 3, 64, 64)
    wanted = folded(x)
    for other in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert torch.equal(other(x), wanted)
    other = copy.deepcopy(folded)
    for parameter in other.parameters():
        parameter.zero_()
    other.load_state_dict(folded.state_dict())
    assert torch.equal(other(x), wanted)
    assert "in_proj.weight" in " ".join(folded.state_dict())


def test_another_class_is_left_alone():
    class Own(nn.Linear):
        pass

    module = nn.Sequential(
        Own(3, 3), nn.Linear(3, 3), nn.modules.linear.NonDynamicallyQuantizableLinear(3, 3)
    )
    fuse_linear(module)
    assert [type(m) for m in module] == [
        Own,
        Linear,
        nn.modules.linear.NonDynamicallyQuantizableLinear,
    ]


def test_no_program_has_onednns_operator(folded):
    x = (torch.randn(2, 3, 64, 64),)
    with torch.no_grad():
        program = torch.export.export(folded, x)
        graph = torch.fx.symbolic_trace(nn.Sequential(folded_layer()))
    assert "mkldnn" not in str(program.graph)
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "output"]


@torch.no_grad()
def test_autocast(folded):
    layer, x = folded_layer(), torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
