"""One pass of a module, recorded as CUDA graphs and replayed on new inputs.

`torch.cuda.make_graphed_callables` records the same way, but hands out its own buffers: a gradient
that it returns becomes ``parameter.grad`` and is overwritten by the next backward pass, so that
accumulation over two batches, or ``zero_grad(set_to_none=False)``, computes with wrong values. It
also differentiates the parameters themselves, whose gradient accumulators may live on another
stream (they do once `DistributedDataParallel` holds them), and it leaves random generators and
running statistics changed. The passes here return copies, differentiate aliases of the parameters,
and leave everything as it was.
"""

from __future__ import annotations

import random
import threading
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from .graph_sums import FastSums
from .graph_weights import ConversionWatch, convert


class NotCapturable(Exception):
    """A pass cannot be replayed; the message says why."""


class Recorder:
    """Records calls as CUDA graphs that share their memory.

    Graphs of one recorder may overwrite each other's intermediate results, so a backward pass must
    be replayed before any other graph than its own forward pass.
    """

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = threading.Lock()
        self.graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self.pool = torch.cuda.graph_pool_handle()
            self.done = torch.cuda.Event()

    def rehearse(self, call: Callable[[], Any], may_wait: bool = False) -> None:
        """Run a call on the stream on which it will be recorded, so that libraries allocate there.

        Raises:
            NotCapturable: the call waits for the device although `may_wait` is False.
        """
        mode = torch.cuda.get_sync_debug_mode()
        with torch.cuda.device(self.device), warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            self.stream.wait_stream(torch.cuda.current_stream())
            try:
                if not may_wait:
                    torch.cuda.set_sync_debug_mode("warn")
                with torch.cuda.stream(self.stream):
                    call()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
                torch.cuda.current_stream().wait_stream(self.stream)
        if any("called a synchronizing CUDA operation" in str(each.message) for each in seen):
            raise NotCapturable("its pass waits for the GPU, as .item() and .cpu() do")

    def record(
        self, call: Callable[[], Any], generators: Sequence[torch.Generator] = ()
    ) -> tuple[Callable[[], None], Any]:
        """Record a call; returns the function that replays it, and the call's result."""
        graph = torch.cuda.CUDAGraph()
        self.graphs.add(graph)
        for generator in generators:
            graph.register_generator_state(generator)
        # A recording that fails leaves its stream current. Other threads, such as those that pin
        # memory, go on with their calls of the driver.
        with (
            torch.cuda.device(self.device),
            torch.cuda.stream(torch.cuda.current_stream(self.device)),
            torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ),
        ):
            result = call()
        return graph.replay, result

    def release(self) -> None:
        """Free the graphs, also those that an autograd graph still holds."""
        with self.lock:
            torch.cuda.synchronize(self.device)
            for graph in self.graphs:
                graph.reset()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A context for a replay, in which no other thread or stream uses the graphs' memory."""
        with self.lock, torch.cuda.device(self.device):
            self.done.wait()
            yield
            self.done.record()

    @contextmanager
    def keep_random_state(self) -> Iterator[None]:
        """Put the generators of Python, PyTorch and the device back to where they were."""
        state = random.getstate()
        try:
            with torch.random.fork_rng([self.device]):
                yield
        finally:
            random.setstate(state)

    def host_state(self) -> Hashable:
        """The state of the generators that a graph cannot draw from."""
        return bytes(torch.get_rng_state().numpy()), random.getstate()

    def recover(self) -> None:
        """Make random numbers possible again after a recording that failed half-way."""
        generator = torch.cuda.default_generators[self.device.index]
        generator.graphsafe_set_state(generator.clone_state())


_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


def describe(value: Any, tensors: list[Tensor]) -> Hashable:
    """What a recorded pass depends on in a value; appends the tensors in it to a list.

    Raises:
        NotCapturable: it is not made of plain tensors and constants in tuples, lists and dicts.
    """
    kind = type(value)
    if kind in (Tensor, nn.Parameter):
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    if isinstance(value, tuple) or kind is list:
        return kind, *(describe(each, tensors) for each in value)
    if kind in (dict, OrderedDict):
        return kind, *((key, describe(each, tensors)) for key, each in value.items())
    if kind in _CONSTANTS:
        return kind, value
    raise NotCapturable(f"it takes or returns {kind.__name__}, which a graph does not know")


def exchange(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same nest of containers with other tensors in place of its own, in order."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, (tuple, list)):
        items = [exchange(each, tensors) for each in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return type(value)((key, exchange(each, tensors)) for key, each in value.items())
    return value


class Watch:
    """Notices that a module is no longer the one whose pass was recorded.

    It compares the attributes of all submodules (which hold their hooks, modes and children), and
    the identity, memory and ``requires_grad`` of all parameters and buffers.
    """

    def __init__(self, module: nn.Module) -> None:
        self.attributes = [
            (name, vars(part), {k: _copy_container(v) for k, v in vars(part).items()})
            for name, part in module.named_modules()
        ]
        holders = chain.from_iterable((m._parameters, m._buffers) for m in module.modules())
        self.holders = [holder for holder in holders if holder]
        self.members = self._members()
        self.tensors = [x for x in self.members if x is not None]
        # Memory that a parameter has left stays allocated as long as a graph may read it.
        self.aliases = [x.detach() for x in self.tensors]
        self.memory = [x.data_ptr() for x in self.aliases]
        self.trained = [x.requires_grad for x in self.tensors]

    def _members(self) -> list[Tensor | None]:
        return list(chain.from_iterable([holder.values() for holder in self.holders]))

    def find_change(self) -> str | None:
        """What has changed, in words, or None."""
        members = self._members()
        if len(members) != len(self.members) or not all(map(is_, members, self.members)):
            return "a parameter or buffer was replaced"
        if [x.data_ptr() for x in self.tensors] != self.memory:
            return "a parameter or buffer has moved in memory"
        if [x.requires_grad for x in self.tensors] != self.trained:
            return "requires_grad of a parameter"
        # The tensors among the members are the same objects, so none is compared by value.
        for name, now, then in self.attributes:
            try:
                if now == then:
                    continue
            except (RuntimeError, TypeError, ValueError):  # an array or tensor has no truth value
                pass
            keys = [k for k in {**now, **then} if k not in now or k not in then]
            keys += [k for k in now if k in then and not _equal(now[k], then[k])]
            return f"attribute {'.'.join(filter(None, (name, keys[0])))}"
        return None


def _copy_container(value: Any) -> Any:
    """A copy of a container that a module may fill; of anything else the same object."""
    if isinstance(value, dict):
        return dict(value)
    return copy(value) if isinstance(value, (list, set, deque)) else value


def _equal(a: Any, b: Any) -> bool:
    try:
        return a is b or bool(a == b)
    except (RuntimeError, TypeError, ValueError):
        return False


class Pass:
    """What is common to recorded passes: static inputs, rehearsal, recording.

    Args:
        module: what runs.
        args, kwargs: its arguments; the pass may be called with others of the same signature.
        recorder: records the calls.

    Raises:
        NotCapturable: a replay would compute something else than the module.
        RuntimeError: CUDA could not record the pass.
    """

    def __init__(self, module: nn.Module, args: tuple, kwargs: dict, recorder: Recorder) -> None:
        tensors: list[Tensor] = []
        describe((args, kwargs), tensors)
        self.inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in tensors]
        self.arguments = exchange((args, kwargs), iter(self.inputs))
        self.module, self.recorder = module, recorder
        # Each place of a parameter, and the parameter's first name. PyTorch's own search for tied
        # weights would exchange those of a module with two names twice, and put back its own.
        first = {p: name for name, p in module.named_parameters()}
        self.names = {
            name: first[p]
            for prefix, part in module.named_modules()
            for name, p in part.named_parameters(prefix, recurse=False, remove_duplicate=False)
        }
        kind = recorder.device_type
        # What autocast converts to, or None without it.
        self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        # The parameters that a replay converts at once, before the module runs.
        self.converted: dict[str, Tensor] = {}
        self.replays = 0
        parts = list(module.modules())
        self.generators = [
            value
            for part in parts
            for value in vars(part).values()
            if isinstance(value, torch.Generator) and value.device.type == recorder.device_type
        ]
        # PyTorch's layer waits for the device, except while it is recorded.
        may_wait = any(isinstance(part, nn.SyncBatchNorm) for part in parts)
        with (
            recorder.keep_random_state(),
            _keep_attributes(parts),
            _keep_buffers(parts),
            self._keep_generators(),
        ):
            watch, host = Watch(module), recorder.host_state()
            versions = [x._version for x in self.inputs]
            self.watch_conversions(may_wait)
            recorder.rehearse(self.rehearsal, may_wait)
            if recorder.host_state() != host:
                raise NotCapturable("its pass draws random numbers on the host")
            if [x._version for x in self.inputs] != versions:
                raise NotCapturable("its pass writes to its inputs")
            change = watch.find_change()
            if change is not None:
                raise NotCapturable(f"its pass changes the module ({change})")
            self.record()
        self.watch = watch

    def watch_conversions(self, may_wait: bool) -> None:
        """Rehearse the pass, and note the parameters that are read in autocast's dtype alone."""
        if self.dtype is None:
            return self.recorder.rehearse(self.rehearsal, may_wait)
        with ConversionWatch(self.module, self.dtype) as watch:
            self.recorder.rehearse(self.rehearsal, may_wait)
        self.converted = watch.find()

    def convert(self) -> dict[str, Tensor]:
        """Those parameters, converted."""
        return convert(self.converted, self.dtype) if self.dtype is not None else {}

    def rehearsal(self) -> None:
        """Run the pass once without recording it."""
        raise NotImplementedError

    def record(self) -> None:
        """Record the pass."""
        raise NotImplementedError

    def run(self, aliases: dict[str, Tensor]) -> list[Tensor]:
        """Run the module on the static inputs, and return the tensors of its result."""
        # Weights that autocast has converted are not to be kept: a replay converts them anew.
        autocast = (
            torch.autocast(self.recorder.device_type, self.dtype, cache_enabled=False)
            if self.dtype is not None
            else nullcontext()
        )
        args, kwargs = self.arguments
        exchanged = {name: aliases[p] for name, p in self.names.items() if p in aliases}
        with autocast:
            result = functional_call(self.module, exchanged, args, kwargs, tie_weights=False)
        tensors: list[Tensor] = []
        describe(result, tensors)
        if any(x.device != self.recorder.device for x in tensors):
            raise NotCapturable(f"it returns a tensor that is not on {self.recorder.device}")
        self.template = exchange(result, (x.detach() for x in tensors))
        return tensors

    def load(self, tensors: Sequence[Tensor]) -> None:
        """Copy new inputs to where the recorded calls read them."""
        self.replays += 1
        for static, x in zip(self.inputs, tensors, strict=True):
            static.copy_(x)

    @contextmanager
    def _keep_generators(self) -> Iterator[None]:
        states = [generator.get_state() for generator in self.generators]
        try:
            yield
        finally:
            for generator, state in zip(self.generators, states, strict=True):
                generator.set_state(state)


@contextmanager
def _keep_attributes(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Give the modules back their attributes, and lists, dicts and sets among them their content.

    A module may count its calls, or collect its losses for the training loop.
    """
    kept = [
        (vars(part), dict(vars(part)), {k: _copy_container(v) for k, v in vars(part).items()})
        for part in parts
    ]
    try:
        yield
    finally:
        for now, then, contents in kept:
            for key in now.keys() - then.keys():
                del now[key]
            now.update(then)
            for key, content in contents.items():
                # What has not changed is left alone, as other threads may read it.
                if not _equal(now[key], content):
                    now[key].clear()
                    fill = "extend" if isinstance(content, (list, deque)) else "update"
                    getattr(now[key], fill)(content)


@contextmanager
def _keep_buffers(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Give the buffers back their tensors and values, such as running statistics."""
    holders = [(part._buffers, dict(part._buffers)) for part in parts if part._buffers]
    buffers = [x for _, held in holders for x in held.values() if x is not None]
    values = [x.clone() for x in buffers]
    try:
        yield
    finally:
        for holder, held in holders:
            holder.update(held)
        with torch.no_grad():
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)


class InferencePass(Pass):
    """A forward pass without gradients. Its results are copies, which later calls leave alone."""

    def rehearsal(self) -> None:
        self.run(self.convert())

    def record(self) -> None:
        self._replay, self.outputs = self.recorder.record(
            lambda: self.run(self.convert()), self.generators
        )

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        with self.recorder.turn():
            self.load(tensors)
            self._replay()
            return exchange(self.template, (x.clone() for x in self.outputs))


class TrainingPass(Pass):
    """A forward pass, and the backward pass that follows it, as one node of the autograd graph."""

    def __init__(self, module: nn.Module, args: tuple, kwargs: dict, recorder: Recorder) -> None:
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.parameters = list(trained.values())
        # Gradients are recorded for aliases, whose accumulators are made on the recorder's stream.
        # Those of the parameters themselves are left to the caller, with hooks and reductions.
        self.aliases = {name: p.detach().requires_grad_() for name, p in trained.items()}
        self.slopes: list[Tensor] | None = None
        super().__init__(module, args, kwargs, recorder)

    def forward(self) -> list[Tensor]:
        """Compute the results of the static inputs, which `backward` differentiates."""
        # The gradient of a converted parameter is converted back where it is copied.
        converted = self.convert()
        self.leaves = {
            name: converted[name].requires_grad_() if name in converted else alias
            for name, alias in self.aliases.items()
        }
        self.live = self.run(converted | self.leaves)
        self.roots = [x for x in self.live if x.requires_grad]
        if not self.roots:
            raise NotCapturable("no result depends on a parameter that requires a gradient")
        return self.live

    def backward(self) -> list[Tensor | None]:
        """Compute the gradients of the inputs and parameters from the slopes of the results."""
        if self.slopes is None:
            self.slopes = [torch.zeros_like(x) for x in self.roots]
        leaves = [x for x in (*self.inputs, *self.leaves.values()) if x.requires_grad]
        # A backward pass runs outside autocast.
        with FastSums(), torch.autocast(self.recorder.device_type, enabled=False):
            found = torch.autograd.grad(self.roots, leaves, self.slopes, allow_unused=True)
        # With the layout of its tensor a gradient is taken over without a further copy.
        return [
            g if g is None or g.stride() == x.stride() else torch.empty_like(x).copy_(g)
            for x, g in zip(leaves, found, strict=True)
        ]

    def rehearsal(self) -> None:
        self.forward()
        self.backward()

    def record(self) -> None:
        recorder, generators = self.recorder, self.generators
        self._forward, results = recorder.record(self.forward, generators)
        self.outputs = [x.detach() for x in results]
        self.differentiable = [x.requires_grad for x in results]
        self._backward, found = recorder.record(self.backward, generators)
        self.live, self.roots, self.leaves = [], [], {}  # the autograd graph is done with
        split = len(found) - len(self.parameters)
        given = iter(found[:split])
        self.input_gradients = [next(given) if x.requires_grad else None for x in self.inputs]
        # A parameter without a gradient is no input of the node, as in the module's own graph.
        pairs = [
            (p, g) for p, g in zip(self.parameters, found[split:], strict=True) if g is not None
        ]
        self.used = [p for p, _ in pairs]
        # Places among them, and gradients, by the dtypes of both.
        self.gradients: dict[tuple[torch.dtype, torch.dtype], tuple[list[int], list[Tensor]]] = {}
        for place, (p, gradient) in enumerate(pairs):
            places, gradients = self.gradients.setdefault((p.dtype, gradient.dtype), ([], []))
            places.append(place)
            gradients.append(gradient)

    def __call__(self, tensors: Sequence[Tensor], step: Step) -> Any:
        outputs = _Replay.apply(self, step, *tensors, *self.used)
        return exchange(self.template, iter(outputs))

    def replay_forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Compute the results, as copies."""
        with self.recorder.turn():
            self.load(tensors)
            self._forward()
            return [x.clone() for x in self.outputs]

    def replay_backward(self, slopes: Sequence[Tensor]) -> list[Tensor | None]:
        """Compute the gradients of the inputs and of the used parameters, as copies."""
        with self.recorder.turn():
            for static, slope in zip(self.slopes or (), slopes, strict=True):
                static.copy_(slope)
            self._backward()
            inputs = [None if g is None else g.clone() for g in self.input_gradients]
            parameters = [torch.empty_like(p) for p in self.used]
            # One call per pair of dtypes copies all of them in a few launches.
            for places, gradients in self.gradients.values():
                torch._foreach_copy_([parameters[place] for place in places], gradients)
            return [*inputs, *parameters]


class Step:
    """A forward pass whose backward pass may be still to come."""

    def __init__(self) -> None:
        self.done = False


class LastStep:
    """The last forward pass of a recorder's graphs, whose intermediate results lie in memory."""

    def __init__(self) -> None:
        self._step: Callable[[], Step | None] = lambda: None

    def waits(self) -> bool:
        """Whether its backward pass may be still to come."""
        step = self._step()
        return step is not None and not step.done

    def begin(self) -> Step:
        """Start another one."""
        step = Step()
        self._step = weakref.ref(step)
        return step


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, record: TrainingPass, step: Step, *tensors: Tensor) -> Any:
        ctx.record, ctx.step = record, step
        outputs = record.replay_forward(tensors[: len(record.inputs)])
        constant = [x for x, d in zip(outputs, record.differentiable, strict=True) if not d]
        ctx.mark_non_differentiable(*constant)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        if ctx.step.done:
            raise RuntimeError(
                "a pass replayed from a CUDA graph is differentiated a second time, and its "
                "intermediate results are gone: call the model again, or call it without graphs"
            )
        ctx.step.done = True
        record = ctx.record
        wanted = [s for s, d in zip(slopes, record.differentiable, strict=True) if d]
        return None, None, *record.replay_backward(wanted)
