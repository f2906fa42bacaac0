"""The acceptance rule of the kernels: errors against float64, relative to eager PyTorch's own."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from linsight.kernels import force

from .conftest import INTERPRETED

# How many times eager's own error a kernel may be off, in its result and in its gradients.
RESULT, GRADIENT = 2.0, 3.0
# Errors below this many roundings of the dtype are rounding's luck, not the kernel's.
ROUNDINGS = {torch.float32: 4.0, torch.float16: 0.5, torch.bfloat16: 0.5}


def leaves(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Copies in `dtype` with the strides of the originals, each wanting a gradient."""
    copies = []
    for x in tensors:
        if x is not None:
            copy = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device)
            x = copy.copy_(x.detach()).requires_grad_()
        copies.append(x)
    return copies


def poison_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new tensors with NaN, which stays where a kernel writes nothing."""
    for place, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        allocate = getattr(place, name)

        def allocate_nan(*args, allocate=allocate, **options) -> Tensor:
            x = allocate(*args, **options)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        monkeypatch.setattr(place, name, allocate_nan)


def outcome(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    dtype: torch.dtype,
    slope: Tensor,
    choice: str,
) -> list[Tensor]:
    """Result and gradients of `function(*tensors)` in `dtype`, on the backend `choice`."""
    with force(choice):
        copies = leaves(tensors, dtype)
        result = function(*copies)
        wanted = [x for x in copies if x is not None]
        gradients = torch.autograd.grad(result, wanted, slope.to(result.dtype))
    return [result.detach(), *gradients]


def factors(x: Tensor) -> Tensor:
    """Factors of stochastic depth for the images of x: of three images the second is dropped."""
    keep = 1.25 * (torch.arange(len(x), device=x.device) % 3 != 1)
    return keep.to(x.dtype).view(-1, *(1 for _ in x.shape[1:]))


def distance(x: Tensor, truth: Tensor, least: float = 1e-300) -> float:
    """|x - truth| / |truth|, or / `least` where that is larger."""
    return ((x.double() - truth).norm() / truth.norm().clamp(min=least)).item()


def assert_as_exact_as_eager(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    dtype: torch.dtype,
    slope: Tensor,
    roundings: float | None = None,
) -> None:
    """Both runs of the Triton kernels agree bit for bit, and err little more than eager does."""
    rounded = [x if x is None else x.to(dtype) for x in tensors]
    slope = slope.to(dtype)
    truth = outcome(function, rounded, torch.float64, slope, "reference")
    eager = outcome(function, rounded, dtype, slope, "reference")
    ours = outcome(function, rounded, dtype, slope, "triton")
    # The interpreter runs one program after the other, and cannot do otherwise the next time.
    again = ours if INTERPRETED else outcome(function, rounded, dtype, slope, "triton")
    # The interpreter rounds to bfloat16 towards zero: twice the error, and again in each factor.
    slack = 2.0 if INTERPRETED and dtype == torch.bfloat16 else 1.0
    floor = (roundings or ROUNDINGS[dtype]) * torch.finfo(dtype).eps
    for i, (x, y, best, same) in enumerate(zip(ours, eager, truth, again, strict=True)):
        assert torch.equal(x, same), f"output {i} differs between two runs"
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        # What cancels to zero, as a softmax's gradient over one token, has no length of its own.
        length = slope.double().norm().item()
        least = length if best.norm() < 1e-12 * length else 1e-300
        error, allowed = distance(x, best, least), distance(y, best, least)
        bound = slack * (RESULT if i == 0 else GRADIENT) * max(allowed, floor)
        assert error <= bound, f"output {i}: error {error:.2e}, eager's {allowed:.2e}"


def assert_empty(function: Callable, tensors: Sequence[Tensor], shape: tuple[int, ...]) -> None:
    """Of no elements kernels give an empty result of this shape, and gradients of zero."""
    inputs: Any = leaves(tensors, torch.float32)
    with force("triton"):
        y = function(*inputs)
        gradients = torch.autograd.grad(y.sum(), inputs)
    assert y.shape == shape
    assert [g.shape for g in gradients] == [x.shape for x in inputs]
    assert not any(g.any() for g in gradients)
