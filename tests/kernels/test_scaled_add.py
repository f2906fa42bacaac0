"""Linear layers: the training step of a scaled one against PyTorch's."""

import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linsight.kernels import force, linear

from .conftest import compiled
from .numerics import assert_as_exact_as_eager, leaves

CPU = torch.device("cpu")
GIVEN = {
    "weight": (False, False),
    "bias": (True, False),
    "scale": (False, True),
    "bias_and_scale": (True, True),
}
SCALED = ("scale", "bias_and_scale")  # the others are PyTorch's own


def case(
    given: tuple[bool, bool], shape: tuple[int, ...], outputs: int, device: torch.device
) -> list[Tensor | None]:
    """x, weight, and the vectors that are given."""
    x, weight = (torch.randn(s, device=device) for s in (shape, (outputs, shape[-1])))
    return [x, weight, *(torch.randn(outputs, device=device) if g else None for g in given)]


def apply(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    return linear(x, weight, bias, scale=scale)


@pytest.mark.parametrize("given", GIVEN)
def test_reference_is_pytorchs(given: str) -> None:
    torch.manual_seed(0)
    tensors = [None if t is None else t.double() for t in case(GIVEN[given], (2, 3, 7), 5, CPU)]
    x, weight, bias, scale = tensors
    wanted = F.linear(x, weight, bias)
    torch.testing.assert_close(apply(*tensors), wanted if scale is None else wanted * scale)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", SCALED)
def test_error_against_float64(given, dtype, device, seed) -> None:
    shape = (2, 70, 12) if device.type == "cpu" else (8, 56, 56, 64)
    tensors = case(GIVEN[given], shape, 72 if device.type == "cpu" else 256, device)
    slope = torch.randn(*shape[:-1], tensors[1].shape[0], device=device)
    assert_as_exact_as_eager(apply, tensors, dtype, slope)


@pytest.mark.triton
def test_random_shapes(random_cases, device, seed) -> None:
    draw = random.Random(seed)
    for _ in random_cases:
        most = 90 if device.type == "cpu" else 5000
        shape = (draw.randint(0, 2), draw.randint(1, most), draw.choice((1, 3, 64, 97)))
        outputs, given = draw.choice((1, 5, 65, 200)), draw.choice(SCALED)
        print(shape, outputs, given)
        tensors = case(GIVEN[given], shape, outputs, device)
        slope = torch.randn(*shape[:-1], outputs, device=device)
        if outputs == 1:
            # The bias's and the scale's gradients are one number: rounding, where terms cancel.
            tensors = [t if t is None else t.abs() for t in tensors]
            slope = slope.abs()
        assert_as_exact_as_eager(apply, tensors, torch.float32, slope)


@pytest.mark.triton
@pytest.mark.parametrize("given", SCALED)
def test_autocast_gives_what_pytorch_gives(given, device, seed) -> None:
    """Dtypes of result and gradients, and the values up to bfloat16's rounding."""
    tensors = case(GIVEN[given], (2, 33, 24), 40, device)
    results = {}
    for choice in ("triton", "reference"):
        copies = leaves(tensors, torch.float32)
        with force(choice), torch.autocast(device.type, torch.bfloat16):
            y = apply(*copies)
        y.float().square().sum().backward()
        results[choice] = [y.detach(), *(t.grad for t in copies if t is not None)]
    for ours, theirs in zip(results["triton"], results["reference"], strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()


@pytest.mark.triton
@pytest.mark.parametrize("frozen", range(4))
def test_frozen_tensors_get_no_gradient(frozen, device, seed) -> None:
    tensors = leaves(case((True, True), (2, 9, 16), 24, device), torch.float32)
    tensors[frozen].requires_grad_(False)
    wanted = [t for t in tensors if t.requires_grad]
    found = []
    for choice in ("triton", "reference"):
        with force(choice):
            found.append(torch.autograd.grad(apply(*tensors).square().sum(), wanted))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.triton
def test_sums_write_every_element(device, monkeypatch) -> None:
    from linsight.kernels import linear_triton as kernels

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    sums = kernels.column_sums(torch.ones(301, 70, device=device)).sum(0)
    torch.testing.assert_close(sums, torch.full_like(sums, 301))


def test_compiles_over_resolutions(device) -> None:
    function = compiled(partial(linear))
    for tokens in (5, 8, 13):
        x, weight, *_ = leaves(case((False, False), (2, tokens, 8), 6, device), torch.float32)
        y = function(x, weight)
        y.sum().backward()
        torch.testing.assert_close(y, linear(x, weight))
