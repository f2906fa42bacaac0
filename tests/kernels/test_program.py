"""Calls that repeat a recorded one: programs of new tensors, launches and operations."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from linsight.kernels.depthwise_conv2d import depthwise_conv2d
from linsight.kernels.layer_norm import add_layer_norm
from linsight.kernels.projected_linear_attention import projected_linear_attention
from linsight.kernels.runtime import program
from linsight.kernels.runtime.program import Program, cache_launches
from linsight.kernels.scaled_add.forward import forward as add
from linsight.kernels.window_attention import window_attention

pytestmark = pytest.mark.triton


def record(run: Callable, *args: object) -> tuple[Callable, list[Program | None]]:
    """A cached function after one call, and what it made of the call."""
    made: list[Program | None] = []

    class Recorder(program._Recorder):
        def make_program(self, results):
            made.append(super().make_program(results))
            return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "_Recorder", Recorder)
        cached = cache_launches(run)
        cached(*args)
    return cached, made


def scaled_sum(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """x + scale * y, by one launch."""
    out = torch.empty_like(x)
    add(x, y, scale, None, out)
    return out


def chain(x: Tensor, scale: Tensor, times: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launches with scratch, a part of a new tensor, an operation, and a view as results."""
    scratch = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    out = x.new_empty(2, *x.shape)
    add(x, x, scale, None, scratch)
    for _ in range(times):
        add(scratch, x, scale, None, scratch)
    add(x, scratch, scale, None, out[1])
    return out[1], scratch.sum(0).to(x.dtype), None


@pytest.fixture
def x(device: torch.device) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(5, 7, device=device)


def test_repeats_a_call(x: Tensor) -> None:
    scale = torch.randn_like(x[0])
    cached, made = record(chain, x, scale, 2)
    assert made[0] is not None
    for seed in range(3):
        torch.manual_seed(seed)
        other, scale = torch.randn_like(x), torch.randn_like(scale)
        for got, expected in zip(cached(other, scale, 2), chain(other, scale, 2), strict=True):
            assert got is None if expected is None else torch.equal(got, expected)
    assert len(made) == 1


def test_signatures_have_programs_of_their_own(x: Tensor) -> None:
    calls: list[int] = []

    def run(x: Tensor, scale: Tensor, times: list[int]) -> Tensor:
        calls.append(1)
        return chain(x, scale, times[0])[0]

    cached = cache_launches(run)
    scale = torch.randn_like(x[0])
    for tensor, times in (
        (x, [1]), (x, [2]), (x[1:], [1]), (x.half(), [1]), (x.t().contiguous().t(), [1]),
        (x.flatten()[1:29].unflatten(0, (4, 7)), [1]),
    ):  # fmt: skip
        before = len(calls)
        first = cached(tensor, scale, times)
        assert len(calls) == before + 1
        assert torch.equal(first, cached(tensor, scale, times))
        assert len(calls) == before + 1
    cached(x, scale, [1])
    assert len(calls) == before + 1


def test_a_tensor_given_twice_is_not_repeated(x: Tensor) -> None:
    """Another call of the signature may give two tensors."""
    scale = torch.ones_like(x[0])
    cached = cache_launches(scaled_sum)
    torch.testing.assert_close(cached(x, x, scale), 2 * x)
    y = torch.randn_like(x)
    torch.testing.assert_close(cached(x, y, scale), x + y)


def test_parts_of_one_tensor(x: Tensor) -> None:
    """How far apart two arguments lie is not in their signature."""
    scale = torch.ones_like(x[0])
    cached = cache_launches(scaled_sum)
    both = torch.randn(4, *x.shape, device=x.device)
    for i in range(4):
        torch.testing.assert_close(cached(both[3 - i], both[i], scale), both[3 - i] + both[i])


def test_results_are_new_each_time(x: Tensor) -> None:
    cached, _ = record(chain, x, x[0].clone(), 1)
    first = cached(x, x[0].clone(), 1)[0]
    before = first.clone()
    cached(x + 1, x[0].clone(), 1)
    assert torch.equal(first, before)


def test_the_number_of_programs_is_bounded(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "MOST_PROGRAMS", 2)
    calls: list[int] = []

    def run(x: Tensor, scale: Tensor, times: int) -> Tensor:
        calls.append(times)
        return chain(x, scale, times)[1]

    cached = cache_launches(run)
    for times in (0, 1, 1, 2, 2, 0):
        result = cached(x, x[0].clone(), times)
        assert torch.equal(result, chain(x, x[0].clone(), times)[1])
    assert calls == [0, 1, 2, 0]


def test_operators_repeat_their_calls(device: torch.device) -> None:
    """Second calls, forward and backward, agree with first calls on the same numbers."""
    torch.manual_seed(0)
    maps = torch.randn(2, 6, 5, 64, device=device)
    weight = torch.randn(16, 1, 3, 3, device=device)
    vector = torch.randn(64, device=device)

    def run(name: str) -> list[Tensor]:
        tensors = [t.clone().requires_grad_() for t in (maps, weight, vector)]
        x, w, v = tensors
        if name == "linear":
            y = projected_linear_attention(x, w, heads=2)
        elif name == "window":
            y = window_attention(x[..., :48], heads=2, windows=((3, 3),), weight=w)
        elif name == "norm":
            y = sum(add_layer_norm(x, x * 2, v, v, scale=v))
        else:
            window = w[..., 1:2] if name == "column" else w
            y = depthwise_conv2d(x[..., 16:32], window, v[:16], activation="gelu")
        y.square().sum().backward()
        return [y.detach(), *(t.grad for t in tensors if t.grad is not None)]

    for name in ("linear", "window", "norm", "depthwise", "column"):
        first = run(name)
        for _ in range(2):
            for got, expected in zip(run(name), first, strict=True):
                assert torch.equal(got, expected), name
