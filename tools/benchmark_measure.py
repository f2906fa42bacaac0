"""Check a case of `linsight benchmark` against a wider dtype, then measure its time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import Tensor, nn

from linsight.backbones.graphs import capture_inference, capture_training
from linsight.kernels import force
from linsight.kernels.runtime.private import get_call
from linsight.tools.benchmark_cases import Case
from linsight.tools.benchmark_timing import capture_graph, copies, elapsed, peak_memory, quantiles

# The largest error of a result and of a gradient, as multiples of eager PyTorch's error.
RESULT, GRADIENT = 2.0, 3.0
# Errors below this many roundings of the dtype always pass.
ROUNDINGS = {torch.float32: 4.0, torch.float16: 0.5, torch.bfloat16: 0.5}
# Calls until a mode has recorded its graphs and replays them; of other modes the first counts.
REPLAYED = {"captured": 3, "reduce-overhead": 3}


class Disagreement(ArithmeticError):
    """A result whose error exceeds the allowed multiple of eager PyTorch's error."""


def check(
    ours: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Compare a result, the first of each sequence, and its gradients with a wider dtype.

    Args:
        ours: tensors under test; they may repeat the images of the other two.
        eager: the same tensors from PyTorch's eager operators in `dtype`.
        exact: the same tensors in a wider dtype.
        dtype: dtype of the computation under test.

    Raises:
        Disagreement: a tensor is not finite, or its error is more than twice (a gradient's: three
            times) the error of `eager`.
    """
    for i, (x, y, truth) in enumerate(zip(ours, eager, exact, strict=True)):
        error, allowed = _distance(x, truth), _distance(y, truth)
        least = ROUNDINGS[dtype] * torch.finfo(dtype).eps
        # "not error <= ..." is true for NaN, unlike "error > ...".
        if not error <= (GRADIENT if i else RESULT) * max(allowed, least):
            what = f"gradient {i}" if i else "result"
            raise Disagreement(f"{what} is off by {error:.1e}, eager PyTorch's by {allowed:.1e}")


def _distance(x: Tensor, truth: Tensor) -> float:
    """The relative L2 distance from the truth of the worst of the repetitions in `x`."""
    x = x.reshape(-1, *truth.shape).to(truth.dtype)
    length = truth.norm().clamp(min=torch.finfo(truth.dtype).tiny)
    return ((x - truth).flatten(1).norm(dim=1).max() / length).item()


def check_if_exact_fits(
    ours: Sequence[Tensor], exact: Callable[[], Sequence[Sequence[Tensor]]], dtype: torch.dtype
) -> str:
    """Run `check` if its references fit into memory; return 'ok' or why they do not.

    Args:
        ours: tensors under test.
        exact: function that makes the other two sequences for `check`.
        dtype: dtype of the computation under test.

    Raises:
        Disagreement: as `check`; also if a tensor is not finite and the references do not fit.
    """
    if not all(x.isfinite().all() for x in ours):
        raise Disagreement("the result is not finite")
    try:
        eager, truth = exact()
    except torch.OutOfMemoryError:
        return "unchecked: the reference ran out of memory"
    check(ours, eager, truth, dtype)
    return "ok"


def distinct_images(batch: int) -> int:
    """How many images of a batch differ; the others repeat them.

    Batch norm and the mean of the losses do not change under repetition, so that the exact result
    of a few images is that of the whole batch.
    """
    return batch if batch < 4 else math.gcd(batch, 2)


def attempt(action: Callable[[], Any]) -> tuple[Any, str]:
    """The result of `action` and an empty string, or None and the reason why it failed. A run goes
    on after the failure of a case."""
    try:
        return action(), ""
    except torch.OutOfMemoryError:
        return None, "out of memory"
    except Disagreement as error:
        return None, f"failed: {error}"
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return None, f"error: {type(error).__name__}: {lines[0][:200]}"


class Subject:
    """The module of a case, after its first call and its check.

    Args:
        case: what is built.
        dtype: of the computation.
        device: where it runs.
        mode: 'eager', 'captured', 'compile', 'reduce-overhead', or what a subclass knows.
        seconds: to repeat a measurement for.

    Attributes:
        check: 'ok', or why the module could not be checked.
        first_call: seconds of the first call, compilation included.
    """

    check: str
    first_call: float

    def __init__(
        self, case: Case, dtype: torch.dtype, device: torch.device, mode: str, seconds: float
    ) -> None:
        self.case, self.dtype, self.device, self.seconds = case, dtype, device, seconds
        self.mode = mode
        with torch.device(device):
            self.module: Any = self.build(device)
        self.function: Callable[..., Any] = self.module
        if mode == "captured":
            (capture_training if self.module.training else capture_inference)(self.module)
        elif mode != "eager":
            # Without a reset the limit on recompilations would count those of earlier cases.
            torch.compiler.reset()
            self.function = self.compile_module()

    def build(self, device: torch.device) -> nn.Module:
        """The module of the case on the device."""
        return self.case.build(device).to(device)

    def compile_module(self) -> Callable[..., Any]:
        """The module as `torch.compile` returns it."""
        mode = "reduce-overhead" if self.mode == "reduce-overhead" else None
        return torch.compile(self.module, dynamic=False, mode=mode)

    def values(self, times: Sequence[float | None], peak: float | None) -> dict[str, Any]:
        """The values that all measurements have in common.

        Raises:
            RuntimeError: the mode is 'captured', and a call ran without graphs.
        """
        if self.mode == "captured" and (reasons := cast(Any, get_call(self.module)).logged):
            raise RuntimeError(f"no graph: {'; '.join(reasons)}")
        return dict(zip(("p20_ms", "p50_ms", "p80_ms"), times, strict=True)) | {
            "peak_mib": peak,
            "first_call_s": self.first_call,
            "check": self.check,
        }


class Operator(Subject):
    """An operator or a mixer, in one dtype throughout."""

    def __init__(
        self, case: Case, dtype: torch.dtype, device: torch.device, mode: str, seconds: float
    ) -> None:
        super().__init__(case, dtype, device, mode, seconds)
        self.module.to(dtype)
        inputs = self.inputs()
        self.first_call = elapsed(lambda: self.forward(inputs), device)
        self.check = self._check(inputs)

    def inputs(self) -> list[Tensor]:
        """Make new arguments and, last, the gradient of the result."""
        different = distinct_images(self.case.batch)

        def noise(*shape: int) -> Tensor:
            x = torch.randn(different, *shape, dtype=self.dtype, device=self.device)
            return x.repeat(self.case.batch // different, *(1 for _ in shape))

        return cast(Callable, self.case.inputs)(noise)  # which operators and mixers have

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            return self.function(*inputs[:-1])

    def forward_backward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return _with_gradients(self.function, inputs)

    def _check(self, inputs: Sequence[Tensor]) -> str:
        different = distinct_images(self.case.batch)
        few = [x[:different] for x in inputs]

        def exact() -> list[list[Tensor]]:
            with force("reference"):
                eager = _with_gradients(self.module, few)
                wide = deepcopy(self.module).double()
                return [eager, _with_gradients(wide, [x.double() for x in few])]

        result, *gradients = self.forward_backward(inputs)
        # A parameter's gradient is summed over all images.
        for i in range(len(inputs) - 1, len(gradients)):
            gradients[i] = gradients[i].double() * (different / self.case.batch)
        # With and without gradients different code runs, and torch.compile makes two programs.
        result = torch.cat((self.forward(inputs), result))
        return check_if_exact_fits([result, *gradients], exact, self.dtype)

    def measure(self, phase: str, graph: bool) -> dict[str, Any]:
        """Time and memory of 'forward' or 'forward+backward'.

        Successive calls get different inputs, which together are larger than the L2 cache.
        """
        run = self.forward if phase == "forward" else self.forward_backward
        inputs = self.inputs()
        peak = peak_memory(lambda: run(inputs), self.device)
        size = sum(x.numel() * x.element_size() for x in inputs)
        arguments = [inputs, *(self.inputs() for _ in range(copies(size, self.device) - 1))]
        calls = [lambda each=each: run(each) for each in arguments]

        def one_by_one() -> None:
            for call in calls:
                call()

        times = quantiles(capture_graph(calls) if graph else one_by_one, self.device, self.seconds)
        return self.values([t / len(calls) for t in times], peak)


def _with_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The result, and the gradients of all inputs but the last and of the parameters."""
    *tensors, slope = inputs
    tensors = [x.detach().requires_grad_() for x in tensors]
    result = function(*tensors)
    gradients = torch.autograd.grad(result, [*tensors, *function.parameters()], slope)
    return [result.detach(), *gradients]


class Network(Subject):
    """A network under autocast, in inference (`predict`) or in training (`learn`).

    Args:
        case, dtype, device, mode, seconds: as of `Subject`.
        phase: 'inference', 'latency', 'training' or 'multi-scale'.
    """

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype,
        device: torch.device,
        mode: str,
        seconds: float,
        phase: str,
    ) -> None:
        self.training = phase in ("training", "multi-scale")
        self.waiting = phase == "latency"
        super().__init__(case, dtype, device, mode, seconds)
        self.prepare()

    def build(self, device: torch.device) -> nn.Module:
        """The network in the mode of its phase; for inference with its constants folded."""
        module = super().build(device).train(self.training)
        return module if self.training else reparameterize_model(module, inplace=True)

    def prepare(self) -> None:
        """Make the batch, call once, and check."""
        raise NotImplementedError

    def autocast(self, exact: bool = False) -> Any:
        if exact or self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def predict(self) -> Any:
        """Run the inference that is timed."""
        raise NotImplementedError

    def learn(self) -> Any:
        """Run the part of a training step that computes the gradients."""
        raise NotImplementedError

    def make_call(self, graph: bool = False) -> Callable[[], Any]:
        """What is timed: inference, or a training step with fused AdamW.

        Args:
            graph: whether the optimiser's step can be recorded in a CUDA graph.
        """
        if not self.training:
            return self.predict
        optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=1e-5, weight_decay=0.05, fused=True, capturable=graph
        )

        def step() -> None:
            self.learn()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def measure(self, graph: bool = False) -> dict[str, Any]:
        """Time and memory of a call.

        With `graph` a CUDA graph is replayed, so that the time does not include the host's calls.
        """
        call = self.make_call(graph)
        call()  # the first step allocates the optimiser's moments
        peak = peak_memory(call, self.device)
        if graph:
            call = capture_graph([call])
        times = quantiles(call, self.device, self.seconds, self.waiting)
        return self.values(times, peak) | {"images_per_second": 1e3 * self.case.batch / times[1]}


class Model(Network):
    """A classifier, checked against a wider dtype."""

    def prepare(self) -> None:
        different = distinct_images(self.case.batch)
        images, labels = self.data(different)
        again = self.case.batch // different
        self.images, self.labels = (
            x.repeat(again, *(1 for _ in x.shape[1:])) for x in (images, labels)
        )
        # The first call updates the statistics of batch norm in training, so copy before it.
        copy = deepcopy(self.module)
        ours: list[Tensor] = []

        def first() -> None:
            for _ in range(REPLAYED.get(self.mode, 1)):
                ours.clear()  # the next replay may overwrite them
                ours.extend(self._outcome(self.function, self.images, self.labels))

        def exact() -> list[list[Tensor]]:
            wide = torch.float64 if self.dtype == torch.float32 else torch.float32
            with force("reference"):
                eager = self._outcome(deepcopy(copy), images, labels)
                return [eager, self._outcome(copy.to(wide), images.to(wide), labels, exact=True)]

        self.first_call = elapsed(first, self.device)
        self.check = check_if_exact_fits(ours, exact, self.dtype)

    def data(self, count: int) -> tuple[Tensor, Tensor]:
        """Make `count` random images and labels."""
        images = torch.randn(count, 3, *self.case.size, device=self.device)
        return images, torch.randint(1000, (count,), device=self.device)

    def _outcome(
        self, function: Callable[..., Any], images: Tensor, labels: Tensor, exact: bool = False
    ) -> list[Tensor]:
        """Logits and, in training, all parameters' gradients as one vector."""
        if not self.training:
            return [self._infer(function, images, exact)]
        logits = self._backward(function, images, labels, exact)
        gradients = [p.grad.flatten() for p in function.parameters() if p.grad is not None]
        function.zero_grad()
        return [logits, torch.cat(gradients)]

    @torch.inference_mode()
    def _infer(self, function: Callable[..., Any], images: Tensor, exact: bool = False) -> Tensor:
        with self.autocast(exact):
            return function(images)

    def _backward(
        self, function: Callable[..., Any], images: Tensor, labels: Tensor, exact: bool = False
    ) -> Tensor:
        with self.autocast(exact):
            logits = function(images)
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        return logits.detach()

    def predict(self) -> Any:
        return self._infer(self.function, self.images)

    def learn(self) -> Tensor:
        return self._backward(self.function, self.images, self.labels)
