"""Which passes are replayed from graphs, and what they leave to the caller, without a GPU."""

import copy
import io
import logging
import pickle
import random
from contextlib import nullcontext

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import linsight
from linsight.backbones import graph_passes, graph_sums, graphs
from linsight.backbones.graph_sums import FastSums
from linsight.backbones.norms import set_training_progress
from linsight.kernels.runtime.private import get_call

from .graph_stand import Stand, compare_two_processes, install


@pytest.fixture(autouse=True)
def stand(monkeypatch):
    install(monkeypatch)


class Small(nn.Module):
    """A batch norm, dropout, weights that are used twice, and one that is not used."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 4)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        x = self.norm(self.first(x)).relu().mean((2, 3))
        return self.head(self.head(self.drop(x)))


def make(seed=0):
    torch.manual_seed(seed)
    return Small()


def images(batch=4, seed=1):
    return torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def steps(model, count=5, *, accumulate=1, to_none=True, batches=None, clip=None):
    """Train, and return all that training leaves."""
    torch.manual_seed(7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    kept, losses = [], []
    for i in range(count):
        for j in range(accumulate):
            batch = batches[i] if batches else 4
            loss = model(images(batch, seed=10 * i + j)).square().mean()
            loss.backward()
            losses.append(loss.detach())
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        kept.append({n: p.grad for n, p in model.named_parameters()})
        values = {n: None if g is None else g.clone() for n, g in kept[-1].items()}
        optimizer.step()
        if to_none:
            for name, value in values.items():  # what a user keeps is not overwritten
                assert value is None or torch.equal(value, kept[-1][name])
        optimizer.zero_grad(set_to_none=to_none)
    return losses, kept if to_none else [], dict(model.state_dict()), torch.get_rng_state()


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif a is None:
        assert b is None
    else:
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 2},
        {"accumulate": 2, "to_none": False},
        {"to_none": False},
        {"clip": 0.1},
    ],
    ids=str,
)
def test_training_is_the_same(options):
    """Losses, gradients that a user keeps, statistics, weights and the generator, to the bit."""
    eager, model = make(), linsight.capture_training(make())
    assert_same(steps(eager, **options), steps(model, **options))
    assert Stand.recorded == 2, "a forward and a backward pass"
    assert Stand.replayed == 2 * (5 * options.get("accumulate", 1) - 1)
    assert model.unused.grad is None
    assert model.norm.num_batches_tracked == 5 * options.get("accumulate", 1)


def test_autocast_is_part_of_a_signature():
    """A replay converts weights once, as autocast does with its cache."""
    eager, model = make(), linsight.capture_training(make())
    for dtype in (torch.bfloat16, torch.float32):
        for _ in range(3):
            outputs = []
            for each in (eager, model):
                torch.manual_seed(3)
                low = dtype != torch.float32
                with torch.autocast("cpu", torch.bfloat16, enabled=low):
                    outputs.append(each(images()))
                outputs[-1].float().sum().backward()
            assert outputs[0].dtype == outputs[1].dtype == dtype
            assert_same(*outputs)
    assert_same(
        *({n: p.grad for n, p in each.named_parameters()} for each in (eager, model)),
    )
    assert Stand.recorded == 4


class ReadsItsWeights(Small):
    """Weights that autocast converts, and that something else reads in their own precision."""

    def forward(self, x):
        return super().forward(x) + self.head.weight.square().sum()


class Count(TorchDispatchMode):
    """Counts conversions of dtype of float32 tensors, one by one and at once."""

    def __init__(self):
        super().__init__()
        self.alone = self.together = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32:
            self.alone += 1
        self.together += operator is torch.ops.aten._foreach_copy_.default
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "alone"), [(Small, 0), (ReadsItsWeights, 2)])
def test_weights_are_converted_at_once(kind, alone):
    """Those of a layer, unless they are read in another dtype, too; `alone` with the image."""
    model = kind().eval()
    captured = linsight.capture_inference(copy.deepcopy(model))
    with torch.no_grad():
        for _ in range(3):
            for p in (*model.parameters(), *captured.parameters()):
                p.mul_(0.9)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(captured(images()), model(images()))
        (found,) = get_call(captured).inference.passes.values()
        with Count() as count:
            found._replay()
    assert (count.alone, count.together) == (1 + alone, 1)


class Adapted(nn.Linear):
    """A user's layer: a linear one with a term of low rank."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


class Tokens(nn.Module):
    """Biases of maps, tokens and single vectors, and positions, which a batch shares."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 8), Adapted(8, 6), nn.Linear(6, 5)
        self.positions = nn.Parameter(torch.randn(1, 36, 8))

    def forward(self, x):
        x = self.first(x.permute(0, 2, 3, 1)).flatten(1, 2)
        x = self.second((x + self.positions.to(x.dtype)).relu())
        return self.head(x.mean(1))


@pytest.fixture
def summed(monkeypatch):
    """The shapes of what `column_sum` is given by a recorded pass."""
    shapes, run = [], graph_sums.column_sum

    def take(x, dtype):
        shapes.append(tuple(x.shape))
        return run(x, dtype=dtype)

    monkeypatch.setattr(graph_sums, "column_sum", take)
    return shapes


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=str)
def test_biases_are_summed_by_the_operator(dtype, summed):
    """While a pass is recorded, in half precision; hooks of parameters get the same."""
    torch.manual_seed(0)
    eager = Tokens()
    model = linsight.capture_training(copy.deepcopy(eager))
    seen = {each: {} for each in (eager, model)}
    for each in (eager, model):
        for name, p in each.named_parameters():
            p.register_hook(lambda g, name=name, each=each: seen[each].update({name: g.clone()}))
    for i in range(3):
        for each in (eager, model):
            before = len(summed)
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                y = each(images(seed=i))
            y.float().square().sum().backward()
            if each is eager or i == 0:
                assert len(summed) == before, "eager passes are PyTorch's"
        names = [name for name, _ in eager.named_parameters()]
        assert_same(*([seen[each][name] for name in names] for each in (eager, model)))
    assert_same(*({n: p.grad for n, p in each.named_parameters()} for each in (eager, model)))
    # Twice in rehearsal, once recorded, and here again in each of two replays.
    each_pass = [(4, 5), (144, 6), (144, 6), (4, 288), (144, 8)] if dtype else []
    assert summed == 5 * each_pass


@pytest.mark.parametrize(
    ("shape", "strides", "axes", "taken"),
    [
        ((6, 4), (4, 1), [0], (6, 4)),
        ((2, 3, 4), (12, 4, 1), [0, 1], (6, 4)),
        ((2, 3, 4), (12, 4, 1), [0], (2, 12)),
        ((2, 3, 4), (12, 4, 1), [1], None),
        ((2, 3, 4), (12, 4, 1), [0, 2], None),
        ((6, 4), (4, 1), [1], None),
        ((6, 4), (4, 1), [0, 1], None),
        ((6, 4), (4, 1), [], None),
        ((6,), (1,), [0], None),
        ((), (), [0], None),
        ((0, 4), (4, 1), [0], None),
        ((6, 4), (1, 6), [0], None),
        ((6, 4), (0, 0), [0], None),
        ((6, 4), (8, 1), [0], None),
    ],
    ids=str,
)
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("wanted", [None, torch.float32], ids=str)
def test_which_sums_the_operator_takes(shape, strides, axes, taken, keepdim, wanted, summed):
    """Those of half precision over leading axes of what lies in one piece."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int64):
        summed.clear()
        x = torch.arange(48).to(dtype).as_strided(shape, strides)
        found = []
        for mode in (nullcontext(), FastSums()):
            with mode:
                found.append(x.sum(axes, keepdim, dtype=wanted))
        assert found[0].dtype == found[1].dtype
        assert_same(*found)
        assert summed == ([taken] if taken and dtype.itemsize == 2 else [])


@pytest.mark.parametrize("shared", ["layer", "weight"])
def test_what_has_two_names_is_trained_once(shared):
    """A layer under two names, and a weight of two layers, which is not left exchanged."""

    def make_shared():
        model = make()
        model.again = model.head if shared == "layer" else nn.Linear(4, 4)
        model.again.weight = model.head.weight
        return model

    eager, model = make_shared(), linsight.capture_training(make_shared())
    weight = model.head.weight
    assert_same(steps(eager), steps(model))
    assert Stand.replayed == 8
    assert model.head.weight is model.again.weight is weight


def test_random_numbers_are_fresh():
    model = linsight.capture_training(make())
    x = images()
    outputs = []
    for _ in range(4):
        outputs.append(model(x))
        outputs[-1].sum().backward()
    assert Stand.replayed == 6
    for i in range(4):
        for j in range(i):
            assert not torch.equal(outputs[i], outputs[j])


def test_inputs_get_gradients():
    eager, model = make(), linsight.capture_training(make())
    for each in (eager, model):
        each.drop.p = 0.0
    for i in range(3):
        inputs = [images(seed=i).requires_grad_() for _ in range(2)]
        for each, x in zip((eager, model), inputs, strict=True):
            each(x).square().sum().backward()
        assert_same(inputs[0].grad, inputs[1].grad)
    assert Stand.recorded == 2


def test_other_shapes_run_eagerly(caplog):
    batches = [4, 4, 4, 3, 4, 3, 4, 2, 2, 4]
    eager, model = make(), linsight.capture_training(make(), shapes=1)
    with caplog.at_level(logging.WARNING):
        got = steps(model, len(batches), batches=batches)
    assert_same(steps(eager, len(batches), batches=batches), got)
    assert Stand.recorded == 2
    assert Stand.replayed == 2 * (batches.count(4) - 1)
    assert [r.message for r in caplog.records] == [
        "A pass of Small runs without CUDA graphs: 1 shapes of inputs are recorded, and it gets "
        "another"
    ]


def test_evaluation_and_no_grad_run_eagerly():
    model = linsight.capture_training(make())
    steps(model, 2)
    recorded, replayed = Stand.recorded, Stand.replayed
    with torch.no_grad():
        model(images())
    model.eval()(images()).sum().backward()
    assert (Stand.recorded, Stand.replayed) == (recorded, replayed)
    model.train()
    steps(model, 1)
    assert (Stand.recorded, Stand.replayed) == (recorded, replayed + 2)


def test_a_pending_backward_pass_keeps_its_values(caplog):
    """Two forward passes before their backward passes, as in contrastive learning."""
    results = []
    for model in (make(), linsight.capture_training(make())):
        steps(model, 2)
        torch.manual_seed(5)
        (model(images(seed=1)) * model(images(seed=2))).sum().backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
        steps(model, 1)
    torch.testing.assert_close(*results)
    (record,) = caplog.records
    assert "backward pass of its last forward pass may still come" in record.message


def test_a_forward_pass_that_is_given_up_is_no_obstacle(caplog):
    model = linsight.capture_training(make())
    steps(model, 2)
    model(images())
    steps(model, 1)
    assert not caplog.records


def test_a_second_backward_pass_is_an_error():
    model = linsight.capture_training(make())
    steps(model, 2)
    loss = model(images()).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def replace_parameter(model):
    model.head.bias = nn.Parameter(torch.ones(4))


def swap_memory(model):
    model.head.weight.data = torch.full((4, 4), 0.5)


def freeze(model):
    model.first.requires_grad_(False)


def replace_layer(model):
    torch.manual_seed(4)
    model.head = nn.Sequential(nn.Linear(4, 4), nn.GELU())


def set_number(model):
    model.drop.p = 0.1


def stop_statistics(model):
    model.norm.eval()


def widen(model):
    model.double()
    model.register_forward_pre_hook(lambda _, args: (args[0].double(),)).remove()
    model.float()


@pytest.mark.parametrize(
    "change",
    [replace_parameter, swap_memory, freeze, replace_layer, set_number, stop_statistics, widen],
)
def test_changes_are_noticed(change):
    results = []
    for model in (make(), linsight.capture_training(make())):
        steps(model, 3)
        change(model)
        results.append(steps(model, 3))
    assert_same(*results)
    assert Stand.recorded == 4


def test_changes_without_end_end_the_attempts(caplog):
    results = []
    for model in (make(), linsight.capture_training(make())):
        got = []
        for i in range(8):
            model.drop.p = i / 10
            got.append(steps(model, 2))
        results.append(got)
    assert_same(*results)
    assert Stand.recorded == 2 * graphs._ATTEMPTS
    assert "changes again and again (attribute drop.p)" in caplog.text


def test_released_graphs_are_gone():
    """They have to be, before NCCL's communicator can end: also those of a loss that is kept."""
    parts = [linsight.capture_training(nn.Linear(4, 4)) for _ in range(2)]
    model = nn.Sequential(*parts, nn.ReLU())
    x = torch.randn(2, 4)
    for _ in range(3):
        y = model(x)
        y.sum().backward()
    assert (Stand.recorded, Stand.replayed) == (4, 8)
    linsight.release_graphs(model)
    linsight.release_graphs(model)
    assert Stand.released == 2
    assert torch.equal(model(x), y)
    model(x).sum().backward()
    assert Stand.replayed == 8
    linsight.capture_training(model)  # as if they had never been there
    for _ in range(3):
        model(x).sum().backward()
    assert Stand.recorded == 6


def test_hooks_run(caplog):
    model = linsight.capture_training(make())
    steps(model, 3)
    seen = []
    handle = model.norm.register_forward_hook(lambda *_: seen.append(1))
    steps(model, 2)
    assert len(seen) == 2
    assert [r.message for r in caplog.records] == [
        "A pass of Small runs without CUDA graphs: hooks of modules do not run in a replay"
    ]
    handle.remove()
    replayed = Stand.replayed
    steps(model, 2)
    assert Stand.replayed == replayed + 4
    handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    try:
        steps(model, 1)
    finally:
        handle.remove()
    assert len(seen) > 2


def test_hooks_of_parameters_run():
    model = linsight.capture_training(make())
    seen = []
    model.head.weight.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
    model.head.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    for _ in range(3):
        model.zero_grad()
        model(images()).sum().backward()
    assert (len(seen), Stand.replayed) == (6, 4)
    assert torch.equal(2 * seen[-2], seen[-1])


class Counts(Small):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Collects(Small):
    """Its loop adds the losses in the list, and empties it."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def forward(self, x):
        y = super().forward(x)
        self.losses.append(y.square().mean())
        return y


class WritesToInput(Small):
    def forward(self, x):
        return super().forward(x.mul_(0.5))


class Rebinds(Small):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean().detach()
        return super().forward(x) + self.mean


class DrawsOnHost(Small):
    def forward(self, x):
        return super().forward(x) * (random.random() > 0.5)


class WantsParameters(Small):
    """Parameters are aliases while a pass is recorded."""

    def forward(self, x):
        if not isinstance(self.head.weight, nn.Parameter):
            raise TypeError("the weight is no parameter")
        return super().forward(x)


class Constant(Small):
    def forward(self, x):
        return x.mean()


class Result:
    pass


class ReturnsObject(Small):
    def forward(self, x):
        result = Result()
        result.logits = super().forward(x)
        return result


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Counts, "its pass changes the module (attribute calls)"),
        (Collects, "its pass changes the module (attribute losses)"),
        (WritesToInput, "its pass writes to its inputs"),
        (Rebinds, "its pass changes the module (a parameter or buffer was replaced)"),
        (DrawsOnHost, "its pass draws random numbers on the host"),
        (WantsParameters, "CUDA could not record it: the weight is no parameter"),
        (Constant, "no result depends on a parameter that requires a gradient"),
        (ReturnsObject, "it takes or returns Result, which a graph does not know"),
    ],
)
def test_what_cannot_be_replayed(kind, reason, caplog):
    results = []
    for capture in (lambda x: x, linsight.capture_training):
        torch.manual_seed(0)
        model = capture(kind())
        random.seed(1)
        outputs = []
        for i in range(5):
            x = images(seed=i)
            y = model(x)
            outputs += [x, getattr(y, "logits", y)]
        outputs += [torch.tensor(getattr(model, "calls", 0)), *getattr(model, "losses", ())]
        results.append((outputs, model.state_dict()))
    assert_same(*results)
    assert not Stand.replayed
    assert [r.message for r in caplog.records] == [
        f"A pass of {kind.__name__} runs without CUDA graphs: {reason}"
    ]


def test_a_recording_that_fails(caplog, monkeypatch):
    monkeypatch.setattr(Stand, "fails", "CUDA out of memory. Tried to allocate 1 TiB.\nMore.")
    eager, model = make(), linsight.capture_training(make())
    assert_same(steps(eager), steps(model))
    assert Stand.recorded == 1, "no second attempt"
    assert "CUDA could not record it: CUDA out of memory. Tried to allocate 1 TiB." in caplog.text


def test_gradient_checkpointing_runs_eagerly(caplog):
    model = linsight.capture_training(timm.create_model("rala_vit_nano", num_classes=3))
    model.set_grad_checkpointing()
    for _ in range(3):
        model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert not Stand.recorded
    assert "gradient checkpointing" in caplog.text


def test_copies_are_their_own():
    model = linsight.capture_training(make())
    steps(model, 2)
    state = model.state_dict()
    assert_same(dict(state), dict(make().state_dict()) | dict(state))
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [
        copy.deepcopy(model),
        copy.copy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ]
    replayed = Stand.replayed
    for each in copies:
        assert get_call(each) is None
        each.eval()
        nn.init.zeros_(each.head.bias) if each is not copies[1] else None
        assert each(images()).shape == (4, 4)
    assert Stand.replayed == replayed
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    averaged(images())


def test_compiled_modules():
    model = make()
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="Small is compiled"):
        linsight.capture_training(model)
    with pytest.raises(ValueError, match="OptimizedModule is compiled"):
        linsight.capture_inference(torch.compile(make(), backend="eager"))
    model = linsight.capture_training(make())
    assert torch.compile(model, backend="eager", fullgraph=True)(images()).shape == (4, 4)
    part = linsight.capture_training(make())
    part.head.compile(backend="eager")
    steps(part, 3)
    assert not Stand.recorded


def test_arguments_are_checked():
    for capture in (linsight.capture_training, linsight.capture_inference):
        with pytest.raises(ValueError, match="shapes is 0"):
            capture(make(), shapes=0)


def test_the_least_recently_used_graph_goes():
    eager = make().eval()
    model = linsight.capture_inference(copy.deepcopy(eager), shapes=2)
    recorded = []
    with torch.inference_mode():
        for batch in (1, 1, 2, 2, 1, 3, 3, 1, 2):
            x = images(batch, seed=batch)
            assert_same(model(x), eager(x))
            recorded.append(Stand.recorded)
    # 3 takes the place of 2, which is recorded anew.
    assert recorded == [0, 1, 1, 2, 2, 2, 3, 3, 4]


def test_inference_results_are_kept():
    model = linsight.capture_inference(make().eval())
    with torch.no_grad():
        outputs = [model(images(seed=i)) for i in range(4)]
    with torch.inference_mode():
        outputs += [model(images(seed=i)) for i in range(4)]
        model.head.bias += 1
        changed = model(images(seed=0))
    assert_same(outputs[:4], outputs[4:])
    assert not torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(changed, outputs[0] + 1 + model.head.weight.sum(1))
    model.head.weight.data = torch.zeros(4, 4)
    with torch.no_grad():
        assert torch.equal(model(images()), model.head.bias.expand(4, 4))
    assert Stand.recorded == 2


def test_training_and_inference_have_graphs_of_their_own():
    eager, model = make(), linsight.capture_inference(linsight.capture_training(make()))
    for _ in range(2):
        assert_same(steps(eager, 3), steps(model, 3))
        for each in (eager, model):
            each.eval()
        with torch.no_grad():
            for i in range(3):
                assert_same(eager(images(seed=i)), model(images(seed=i)))
        for each in (eager, model):
            each.train()
    assert Stand.recorded == 3


class Nest(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, maps, *, scale=1.0, more=None):
        first, (second,) = maps
        out = {"a": self.layer(first) * scale, "rest": [second.argmax(1), None, "name"]}
        return (out, more["x"] + out["a"]) if more else out


def test_nests_of_tensors():
    torch.manual_seed(0)
    eager = Nest()
    model = linsight.capture_training(copy.deepcopy(eager), shapes=3)
    for options in ({}, {"scale": 2.0}, {"more": {"x": torch.ones(3)}}):
        for i in range(3):
            x = torch.randn(2, 3), (torch.randn(2, 3, requires_grad=bool(i % 2)),)
            got, wanted = model(x, **options), eager(x, **options)
            assert type(got) is type(wanted)
            flat = [y[0] if isinstance(y, tuple) else y for y in (got, wanted)]
            assert_same(flat[0]["a"], flat[1]["a"])
            assert torch.equal(flat[0]["rest"][0], flat[1]["rest"][0])
            assert flat[0]["rest"][1:] == [None, "name"]
            flat[0]["a"].sum().backward()


@pytest.mark.parametrize(
    "name",
    [
        "agent_swin_tiny",
        "inline_pvt_tiny",
        "mala_vit_tiny",
        "rala_vit_nano",
        "soft_norm_vit_tiny",
        "softmax_swin_tiny",
        "resnet18",
        "convnext_atto",
    ],
)
def test_a_pass_leaves_a_model_alone(name):
    """No pass sets attributes or buffers, or returns what a graph does not know."""
    with torch.device("meta"):
        options = {"norm_layer": "prepbn"} if name == "rala_vit_nano" else {}
        model, x = timm.create_model(name, **options), torch.empty(2, 3, 224, 224)
    for training in (True, False):
        watch = graph_passes.Watch(model.train(training))
        with torch.set_grad_enabled(training):
            assert graph_passes.describe(model(x), [])
        assert watch.find_change() is None
        set_training_progress(model, 0.5)
        assert watch.find_change() is None


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize(
    "options", [(), pytest.param(("--after",), marks=pytest.mark.slow)], ids=str
)
def test_two_processes(options):
    """Wrapped by DistributedDataParallel after and before the model is captured."""
    compare_two_processes(*options, CUDA_VISIBLE_DEVICES="")


def test_descriptions_of_values():
    tensors = []
    described = graph_passes.describe(([torch.ones(2), 1], {"a": (True, torch.zeros(()))}), tensors)
    assert len(tensors) == 2
    assert hash(described)
    assert graph_passes.describe(1, []) != graph_passes.describe(True, [])
    with pytest.raises(graph_passes.NotCapturable, match="takes or returns set"):
        graph_passes.describe({1}, [])
