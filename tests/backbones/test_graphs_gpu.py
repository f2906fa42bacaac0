"""Passes that are replayed from CUDA graphs equal the model's own, on a GPU."""

import copy
import threading
from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn

import linsight
from linsight.kernels.column_sum import operator
from linsight.kernels.runtime.private import get_call

from .graph_stand import compare_two_processes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Libraries choose and add in other orders; a wrong gradient or a wrong weight is off by far more.
BOUND = {"float32": 2e-3, "bfloat16": 5e-2, "float16": 2e-2}


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


def make(name="rala_vit_nano", **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, drop_path_rate=0.2, **options).cuda()


def batch(i, size=8, side=64):
    generator = torch.Generator().manual_seed(i)
    images = torch.randn(size, 3, side, side, generator=generator)
    return images.cuda(), torch.randint(10, (size,), generator=generator).cuda()


def passes(model):
    return get_call(model).training


def replays(model):
    return sum(each.replays for each in passes(model).passes.values())


def distance(a, b):
    """The relative distance of two lists of tensors, in the norm of all of them."""
    a, b = (torch.cat([x.detach().double().flatten() for x in each]) for each in (a, b))
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


class Loop:
    """A user's own loop, with all that may stand around a model."""

    def __init__(self, model, dtype="float32", accumulate=1, to_none=True, clip=None):
        self.model, self.accumulate, self.to_none, self.clip = model, accumulate, to_none, clip
        self.dtype = DTYPES[dtype]
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        self.scaler = torch.amp.GradScaler("cuda", enabled=dtype == "float16", init_scale=1024.0)
        self.ema = ModelEmaV3(model, decay=0.5)
        self.gradients = []

    def step(self, i, size=8):
        for j in range(self.accumulate):
            images, labels = batch(100 * i + j, size)
            with torch.autocast("cuda", self.dtype, enabled=self.dtype is not None):
                loss = F.cross_entropy(self.model(images).float(), labels)
            self.scaler.scale(loss / self.accumulate).backward()
        self.scaler.unscale_(self.optimizer)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.gradients = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=self.to_none)
        self.ema.update(self.model)
        return loss.detach()


def compare(a, b, bound):
    """Gradients of the last step, weights, averaged weights, running statistics."""
    assert len(a.gradients) == len(b.gradients)
    assert distance(b.gradients, a.gradients) < 10 * bound
    for x, y in ((a.model, b.model), (a.ema.module, b.ema.module)):
        state, other = x.state_dict(), y.state_dict()
        assert state.keys() == other.keys()
        for name, value in state.items():
            if not value.is_floating_point():
                assert torch.equal(value, other[name]), name
        floats = [name for name, value in state.items() if value.is_floating_point()]
        assert distance([other[n] for n in floats], [state[n] for n in floats]) < bound
        moving = [name for name in floats if name.endswith(("running_mean", "running_var"))]
        assert moving
        assert distance([other[n] for n in moving], [state[n] for n in moving]) < bound
    assert a.scaler.state_dict() == b.scaler.state_dict()


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate": 2}, {"accumulate": 2, "to_none": False}, {"to_none": False, "clip": 0.5}],
    ids=str,
)
def test_training_is_the_same(dtype, options):
    """With drop path, batch norm, scaled and clipped gradients, and averaged weights."""
    loops, losses, states = [], [], []
    for capture in (lambda model: model, linsight.capture_training):
        loop = Loop(capture(make()), dtype, **options)
        torch.manual_seed(1)
        losses.append(torch.stack([loop.step(i) for i in range(6)]))
        states.append(torch.cuda.get_rng_state())
        loops.append(loop)
    assert replays(loops[1].model) == 6 * options.get("accumulate", 1) - 1
    compare(*loops, BOUND[dtype])
    torch.testing.assert_close(losses[1], losses[0], rtol=BOUND[dtype], atol=BOUND[dtype])
    assert torch.equal(*states), "as many random numbers are drawn"


@pytest.mark.parametrize("name", ["softmax_swin_tiny", "agent_deit_tiny", "resnet18"])
def test_other_models(name):
    loops = []
    options = {"img_size": 224} if "deit" in name else {}
    for capture in (lambda model: model, linsight.capture_training):
        model = capture(make(name, **options))
        gradients = []
        torch.manual_seed(1)
        for i in range(3):
            images, labels = batch(i, 4, 224)
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                F.cross_entropy(model(images).float(), labels).backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        loops.append(gradients)
    assert replays(model) == 2
    for eager, graphed in zip(*loops, strict=True):
        assert distance(graphed, eager) < 5e-2


def test_biases_are_summed_by_the_operator(monkeypatch):
    """In the rehearsal that nothing watches and the recording, and no worse than eager sums."""
    taken, run = [], operator.column_sum
    monkeypatch.setattr(
        operator, "column_sum", lambda *args: taken.append(tuple(args[0].shape)) or run(*args)
    )
    layer = nn.Linear(64, 96).cuda()
    errors = []
    for capture in (lambda model: model, linsight.capture_training):
        model = capture(copy.deepcopy(layer))
        for i in range(3):
            x = torch.randn(16, 784, 64, generator=torch.Generator().manual_seed(i)).cuda()
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                y = model(x)
            y.backward(y.detach())
        exact = y.detach().double().sum((0, 1))
        errors.append(distance([model.bias.grad], [exact]))
    assert replays(model) == 2
    assert taken == 2 * [(16 * 784, 96)]
    assert errors[1] <= 2 * max(errors[0], torch.finfo(torch.bfloat16).eps / 2)


def test_drop_path_is_fresh():
    model = linsight.capture_training(nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)).cuda())
    x = torch.ones(256, 64, device="cuda")
    kept = []
    for _ in range(20):
        y = model(x)
        y.sum().backward()
        kept.append(y.detach() != 0)
    assert replays(model) == 19
    share = torch.stack(kept).double().mean(0)
    assert 0.49 < share.mean() < 0.51
    assert all(not torch.equal(a, b) for a, b in pairwise(kept))
    torch.manual_seed(3)
    first = model(x)
    first.sum().backward()
    torch.manual_seed(3)
    assert torch.equal(first, model(x))


class Draws(nn.Module):
    """Dropout from a generator of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.generator = torch.Generator("cuda").manual_seed(1)

    def forward(self, x):
        noise = torch.empty_like(x).bernoulli_(0.5, generator=self.generator)
        return self.layer(x * noise)


def test_a_generator_of_its_own():
    outputs = []
    for capture in (lambda model: model, linsight.capture_training):
        torch.manual_seed(0)
        model = capture(Draws().cuda())
        x = torch.ones(32, 16, device="cuda")
        for _ in range(5):
            outputs.append(model(x))
            outputs[-1].sum().backward()
    assert replays(model) == 4
    for eager, graphed in zip(outputs[:5], outputs[5:], strict=True):
        torch.testing.assert_close(graphed, eager)
    assert not torch.equal(outputs[8], outputs[9])


def test_kept_gradients_and_results_stay():
    model = linsight.capture_training(make())
    kept = []
    for i in range(5):
        model.zero_grad(set_to_none=True)
        y = model(batch(i)[0])
        y.square().mean().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        kept.append((y.detach(), gradients, y.detach().clone(), [g.clone() for g in gradients]))
    for y, gradients, same, values in kept:
        assert torch.equal(y, same)
        assert all(torch.equal(a, b) for a, b in zip(gradients, values, strict=True))


def test_inputs_get_gradients_and_hooks_of_parameters_run():
    found = []
    for capture in (lambda model: model, linsight.capture_training):
        model, seen = capture(make()), []
        parameter = next(model.parameters())
        parameter.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(p.grad))
        torch.manual_seed(1)
        for i in range(3):
            model.zero_grad()
            x = batch(i)[0].requires_grad_()
            model(x).square().sum().backward()
        assert len(seen) == 3
        found.append([x.grad, seen[-1]])
    assert replays(model) == 2
    assert distance(found[1], found[0]) < 2e-3


def test_resuming_is_the_same(tmp_path):
    whole = Loop(linsight.capture_training(make()))
    torch.manual_seed(1)
    for i in range(3):
        whole.step(i)
    torch.save(
        {
            "model": whole.model.state_dict(),
            "optimizer": whole.optimizer.state_dict(),
            "ema": whole.ema.state_dict(),
        },
        tmp_path / "state.pth",
    )
    for i in range(3, 6):
        torch.manual_seed(i)
        whole.step(i)
    resumed = Loop(linsight.capture_training(make()))
    state = torch.load(tmp_path / "state.pth", map_location="cuda")
    resumed.step(9)
    resumed.step(9)  # recorded before the weights are loaded
    resumed.model.load_state_dict(state["model"])
    resumed.optimizer.load_state_dict(state["optimizer"])
    resumed.ema.load_state_dict(state["ema"])
    for i in range(3, 6):
        torch.manual_seed(i)
        resumed.step(i)
    compare(whole, resumed, BOUND["float32"])


def test_shapes_modes_and_changes(caplog):
    loops = []
    for capture in (lambda model: model, lambda model: linsight.capture_training(model, shapes=1)):
        loop = Loop(capture(make()))
        torch.manual_seed(1)
        for i, size in enumerate((8, 8, 8, 6, 6, 8)):
            loop.step(i, size)
        with torch.no_grad():
            loop.model(batch(0)[0])
            loop.model.eval()(batch(0)[0])
        loop.model.train()
        loop.step(7)
        parameter = loop.model.get_classifier().weight
        parameter.data = parameter.data.clone()  # other memory
        loop.step(8)
        loop.step(9)
        loops.append(loop)
    compare(*loops, BOUND["float32"])
    assert "1 shapes of inputs are recorded, and it gets another" in caplog.text


def test_two_forward_passes_before_their_backward_passes(caplog):
    found = []
    for capture in (lambda model: model, linsight.capture_training):
        # PyTorch refuses this of batch norms, whose statistics the second pass changes.
        model = capture(make("softmax_deit_tiny", img_size=64))
        torch.manual_seed(1)
        for i in range(4):
            model.zero_grad()
            loss = (model(batch(i)[0]) * model(batch(i + 50)[0])).sum()
            loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert distance(found[1], found[0]) < 2e-2
    assert "backward pass of its last forward pass may still come" in caplog.text


class Waits(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        return self.layer(x) * (2.0 if x.sum().item() > 0 else 1.0)


def test_a_pass_that_waits_runs_eagerly(caplog):
    model = linsight.capture_training(Waits().cuda())
    x = torch.ones(4, 16, device="cuda")
    for sign in (1, 1, 1, -1):
        expected = model.layer(sign * x) * (2.0 if sign > 0 else 1.0)
        torch.testing.assert_close(model(sign * x), expected)
    assert "waits for the GPU" in caplog.text


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_inference(dtype):
    """Three shapes in two places, with changed weights, in both modes without gradients."""
    eager = make().eval()
    model = linsight.capture_inference(copy.deepcopy(eager), shapes=2)
    outputs = []
    for i, size in enumerate((1, 1, 1, 2, 2, 1, 3, 3, 2, 2, 1)):
        mode = torch.inference_mode() if i % 2 else torch.no_grad()
        images = batch(i, size)[0]
        low = DTYPES[dtype]
        with mode, torch.autocast("cuda", low, enabled=low is not None):
            outputs.append((model(images), eager(images)))
        if i == 2:
            with torch.no_grad():
                for each in (eager, model):
                    each.get_classifier().weight.mul_(2)
    for got, expected in outputs:
        assert distance([got], [expected]) < BOUND[dtype]
    kept = get_call(model).inference.passes
    assert len(kept) == 2
    assert sum(each.replays for each in kept.values()) >= 2


def test_inference_in_threads():
    """Threads with streams of their own share one graph, and wait for each other."""
    eager = make().eval()
    model = linsight.capture_inference(copy.deepcopy(eager))
    inputs = [batch(i, 2)[0] for i in range(6)]
    with torch.inference_mode():
        expected = [eager(x) for x in inputs]
        model(inputs[0]), model(inputs[0])
    torch.cuda.synchronize()
    wrong = []

    def run(i):
        with torch.cuda.stream(torch.cuda.Stream()), torch.inference_mode():
            wrong.extend(i for _ in range(20) if distance([model(inputs[i])], [expected[i]]) > 2e-3)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_graph_of_a_whole_step():
    """Within a user's own recording a model runs its launches, which that graph takes up."""
    model = linsight.capture_inference(make().eval())
    x = batch(0)[0]
    with torch.inference_mode():
        expected = [model(x) for _ in range(3)][-1]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        graph.replay()
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("options", [(), ("--sync",), ("--after",)], ids=str)
def test_two_processes(options):
    compare_two_processes(*options)


class Asks(nn.Module):
    """A pass that CUDA refuses to record, and that no rehearsal finds."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        torch.cuda.current_stream().query()
        return F.dropout(self.layer(x), 0.5, self.training)


def test_a_recording_that_fails(caplog):
    """The last test, because it leaves a recording half-way."""
    x = torch.ones(64, 16, device="cuda")
    model = linsight.capture_training(Asks().cuda())
    outputs = [model(x) for _ in range(4)]
    sum(y.sum() for y in outputs).backward()
    assert "CUDA could not record it" in caplog.text
    assert not torch.equal(outputs[2], outputs[3])
    other = linsight.capture_training(nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5)).cuda())
    outputs = []
    for _ in range(4):
        outputs.append(other(x))
        outputs[-1].sum().backward()
    assert replays(other) == 3
    assert not torch.equal(outputs[2], outputs[3])
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
