"""Linear layers of folded models, which oneDNN computes on a CPU in inference."""

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils.model import reparameterize_model
from torch import nn

from linsight.backbones import linear as module
from linsight.backbones.linear import Linear, fuse_linear
from linsight.backbones.skeletons import base, vit
from linsight.kernels import force, linear

from .conftest import lively

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
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


# A body of stages, and one of blocks alone.
BODIES = {
    "rala_vit_nano": {"depths": (1, 0, 1, 0)},
    "softmax_deit_tiny": {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64},
}


@pytest.fixture(scope="module", params=BODIES)
def body(request):
    return reparameterize_model(
        lively(timm.create_model(request.param, num_classes=10, **BODIES[request.param]))
    )


def as_autocast_alone(monkeypatch, function):
    with monkeypatch.context() as patch:
        for skeleton in (base, vit):
            patch.setattr(skeleton, "convert_weights", lambda blocks, x: nullcontext())
        return function()


def in_bfloat16(model, x, features=False):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return model.forward_intermediates(x) if features else model(x)


@pytest.mark.parametrize("features", [False, True])
def test_weights_are_converted_at_once_under_autocast(body, features, monkeypatch):
    x = torch.randn(2, 3, 64, 64)
    got = in_bfloat16(body, x, features)
    wanted = as_autocast_alone(monkeypatch, lambda: in_bfloat16(body, x, features))
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    calls, converted = [], []
    convert = torch._foreach_copy_
    monkeypatch.setattr(
        torch, "_foreach_copy_", lambda a, b: (converted.extend(b), calls.append(1), convert(a, b))
    )
    with torch.inference_mode():
        in_bfloat16(body, x, features)
    layers = [m for m in body.modules() if type(m) is Linear]
    own = {id(p) for m in layers for p in m.parameters()}
    # All but those of RALA's head, which stand outside of the blocks.
    assert {id(p) for p in converted} <= own
    assert len(own) - len(converted) == (4 if hasattr(body, "stages") else 0)
    assert len(calls) <= 4


def test_converted_weights_follow_the_parameters(body, monkeypatch):
    """In whatever way they are changed: in place, unseen by autograd, or for another tensor."""
    model = copy.deepcopy(body)
    x = torch.randn(2, 3, 64, 64)
    layers = [m for m in model.modules() if type(m) is Linear]
    seen = [in_bfloat16(model, x)]

    def scale_data():
        for m in layers:
            m.weight.data.mul_(1.5)

    def other_data():
        for m in layers:
            m.weight.data = m.weight.data.clone() * 0.5

    def other_parameter():
        layers[0].weight = nn.Parameter(layers[0].weight.detach() + 0.1)

    def no_bias():
        layers[1].bias = None

    def half():
        layers[0].to(torch.bfloat16)

    def another_layer():
        for m in model.modules():
            for name, child in m.named_children():
                if child is layers[2]:
                    setattr(m, name, nn.Linear(child.in_features, child.out_features))

    for change in (scale_data, other_data, other_parameter, no_bias, half, another_layer):
        torch.manual_seed(0)
        change()
        y = in_bfloat16(model, x)
        assert torch.equal(y, as_autocast_alone(monkeypatch, lambda: in_bfloat16(model, x)))
        # Autocast's copy is what the layer then has itself.
        assert torch.equal(y, seen[-1]) == (change is half)
        seen.append(y)


def test_converted_weights_are_of_inference_under_autocast_alone(body, monkeypatch):
    model = copy.deepcopy(body)
    x = torch.randn(2, 3, 64, 64)
    monkeypatch.setattr(torch, "_foreach_copy_", None)  # a call would fail
    with torch.no_grad():
        model(x)
        torch.jit.trace(model, x, check_trace=False)
    with torch.autocast("cpu", torch.bfloat16):
        model(x).float().sum().backward()
    assert all(m.weight.grad is not None for m in model.modules() if type(m) is Linear)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.export.export(model, (x,))


@pytest.mark.parametrize(
    "inner",
    [
        lambda: torch.autocast("cpu", enabled=False),
        lambda: torch.autocast("cpu", torch.float16),
        torch.enable_grad,
    ],
)
def test_a_part_of_a_pass_that_runs_otherwise(inner, monkeypatch):
    layer, x = folded_layer(), torch.randn(3, 24)
    blocks = nn.ModuleList([layer])

    def run():
        with inner():
            return layer(x)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = run()
        with module.convert_weights(blocks, x):
            assert layer(x).dtype == torch.bfloat16
            got = run()
    assert got.dtype == wanted.dtype
    assert got.requires_grad == wanted.requires_grad
    assert torch.equal(got, wanted)


def test_threads_convert_for_themselves(body):
    x = torch.randn(4, 2, 3, 64, 64)
    wanted = [in_bfloat16(body, each) for each in x]
    with ThreadPoolExecutor(4) as pool:
        for got, each in zip(
            pool.map(lambda i: in_bfloat16(body, x[i]), [0, 1, 2, 3] * 3), wanted * 3, strict=True
        ):
            assert torch.equal(got, each)


def test_a_model_that_is_gone_leaves_nothing(body):
    model = copy.deepcopy(body)
    gc.collect()
    before = len(module._layers)
    in_bfloat16(model, torch.randn(1, 3, 64, 64))
    assert len(module._layers) > before
    del model
    gc.collect()
    assert len(module._layers) == before
    assert module._pass.weights is None
    with pytest.raises(RuntimeError, match="on purpose"), module._hold({}):
        raise RuntimeError("on purpose")
    assert module._pass.weights is None


@needs_cuda
def test_each_stream_converts_for_itself(body):
    model = copy.deepcopy(body).cuda()
    images = torch.randn(6, 2, 3, 64, 64, device="cuda")

    def run(x):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream), torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            results = [model(x) for _ in range(5)]
        stream.synchronize()
        return results

    wanted = [run(x)[0] for x in images]
    with ThreadPoolExecutor(6) as pool:
        for results, y in zip(pool.map(run, images), wanted, strict=True):
            assert all(torch.equal(result, y) for result in results)


@needs_cuda
def test_a_graph_of_a_users_own_converts_at_each_replay(body):
    model, x = copy.deepcopy(body).cuda(), torch.randn(2, 3, 64, 64, device="cuda")

    def run():
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return model(x)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for factor in (1.0, 1.5):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(factor)
        wanted = run()
        graph.replay()
        assert torch.equal(y, wanted)
