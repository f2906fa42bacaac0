"""The Triton kernels of focal loss and deformable attention, against float64 and eager PyTorch."""

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from linsight.kernels import force
from linsight.kernels.mmcv_operators import deformable_attention, focal_loss

from ..conftest import INTERPRETED
from ..numerics import distance

pytestmark = pytest.mark.triton

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_close(ours: Tensor, eager: Tensor, truth: Tensor, times: float) -> None:
    """An error of at most `times` eager's own, or of half a rounding."""
    assert ours.dtype == eager.dtype
    floor = (4 if ours.dtype == torch.float32 else 0.5) * torch.finfo(ours.dtype).eps
    assert distance(ours, truth) <= times * max(distance(eager, truth), floor)


def focal(choice: str, x: Tensor, target: Tensor, weight: Tensor, gamma: float) -> list[Tensor]:
    results = [torch.full_like(x, torch.nan) for _ in range(2)]
    operators = (focal_loss.sigmoid_focal_loss_forward, focal_loss.sigmoid_focal_loss_backward)
    with force(choice):
        for operator, result in zip(operators, results, strict=True):
            operator(x, target, weight, result, gamma=gamma, alpha=0.25)
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_sigmoid_focal_loss(seed, device, dtype, gamma, weighted):
    check_focal_loss(device, dtype, gamma, weighted, 37, 11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_shapes_of_the_focal_loss(random_cases, seed, device, dtype):
    draw = random.Random(seed)
    for _ in random_cases:
        rows = draw.choice((1, 6, 130) if INTERPRETED else (1, 6, 130, 1031))
        classes = draw.choice((1, 2, 80, 131))
        gamma, weighted = draw.choice((0.0, 0.5, 2.0)), draw.random() < 0.5
        print(rows, classes, gamma, weighted)
        check_focal_loss(device, dtype, gamma, weighted, rows, classes)


def check_focal_loss(device, dtype, gamma, weighted, rows, classes):
    x = (torch.randn(rows, classes) * 6).clamp(-20, 20).to(device, dtype)
    x[rows // 2] = 0
    target = torch.randint(-1, classes + 1, (rows,), device=device)
    weight = torch.rand(classes if weighted else 0).to(device, dtype)
    truth = focal("reference", x.double(), target, weight.double(), gamma)
    eager = focal("reference", x, target, weight, gamma)
    ours = focal("triton", x, target, weight, gamma)
    for result, theirs, best, times in zip(ours, eager, truth, (2, 3), strict=True):
        assert_close(result, theirs, best, times)


def test_sigmoid_focal_loss_of_strided_and_empty_tensors(device):
    x = torch.randn(4, 6).to(device).T
    target = torch.tensor([0, 1, 2, 3, 4, -1], device=device)
    weight = torch.zeros(0, device=device)
    for ours, eager in zip(
        focal("triton", x, target, weight, 2.0),
        focal("reference", x, target, weight, 2.0),
        strict=True,
    ):
        torch.testing.assert_close(ours, eager)
    focal("triton", x[:0], target[:0], weight, 2.0)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_focal_loss_of_logits_that_are_not_finite(device, gamma):
    """A masked class has the logit -inf and no loss; what overflowed is not hidden."""
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0]] * 4, device=device)
    target = torch.arange(4, device=device)
    weight = torch.zeros(0, device=device)
    ours, eager = (focal(choice, x, target, weight, gamma)[0] for choice in ("triton", "reference"))
    torch.testing.assert_close(ours, eager, equal_nan=True)
    assert ours[:, 1].tolist() == [0, torch.inf, 0, 0]


def attention_problem(
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    queries: int,
    levels: Sequence[tuple[int, int]] = ((7, 5), (3, 4), (1, 2)),
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Values, locations and weights in `dtype`; the levels' shapes and where they start."""
    shapes = torch.tensor(levels, device=device)
    ends = shapes.prod(1).cumsum(0)
    starts = ends - shapes.prod(1)
    value = torch.randn(2, ends[-1], 3, width)
    locations = (torch.rand(2, queries, 3, len(levels), 2, 2) * 1.5 - 0.25).to(dtype)
    # At -1 exactly a sample has a kink: mmcv's derivative, and ours, is the one from outside.
    sizes = shapes.cpu().flip(-1)[:, None]
    locations[locations.float() * sizes - 0.5 == -1] = 0.5
    weights = torch.rand(2, queries, 3, len(levels), 2)
    return tuple(x.to(device, dtype) for x in (value, locations, weights)), shapes, starts


def attention(
    choice: str, tensors: tuple[Tensor, ...], shapes: Tensor, starts: Tensor, slope: Tensor
) -> list[Tensor]:
    value, locations, weights = tensors
    gradients = [torch.full_like(x, torch.nan) for x in tensors]
    with force(choice):
        out = deformable_attention.ms_deform_attn_forward(
            value, shapes, starts, locations, weights, im2col_step=64
        )
        deformable_attention.ms_deform_attn_backward(
            value, shapes, starts, locations, weights, slope, *gradients, im2col_step=64
        )
    return [out, *gradients]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "queries"), [(8, 19), (24, 1), (32, 17)])
def test_deformable_attention(seed, device, dtype, width, queries):
    check_attention(attention_problem(device, dtype, width, queries))


def test_random_shapes_of_deformable_attention(random_cases, seed, device):
    draw = random.Random(seed)
    for _ in random_cases:
        width, queries = draw.choice((8, 24, 32)), draw.choice((1, 3) if INTERPRETED else (1, 17))
        levels = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(draw.randint(1, 3))]
        dtype = draw.choice(DTYPES)
        print(width, queries, levels, dtype)
        check_attention(attention_problem(device, dtype, width, queries, levels))


def check_attention(problem):
    (value, locations, _), *_ = problem
    slope = torch.randn(2, locations.shape[1], 3 * value.shape[-1]).to(value)
    doubled = tuple(x.double() for x in problem[0])
    truth = attention("reference", doubled, *problem[1:], slope.double())
    eager = attention("reference", *problem, slope)
    ours = attention("triton", *problem, slope)
    # The interpreter runs one program after the other, and cannot do otherwise the next time.
    again = ours if INTERPRETED else attention("triton", *problem, slope)
    for i, (result, same, theirs, best) in enumerate(zip(ours, again, eager, truth, strict=True)):
        assert torch.equal(result, same), f"output {i} differs between two runs"
        assert_close(result, theirs, best, 3 if i else 2)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e30])
def test_integer_sums_at_any_magnitude(seed, device, size):
    problem = attention_problem(device, torch.float32, 8, 5)
    slope = torch.randn(2, 5, 24).to(device)
    one = attention("triton", *problem, slope)[1]
    scaled = attention("triton", *problem, slope * size)[1]
    torch.testing.assert_close(scaled / size, one, rtol=1e-5, atol=1e-6)


def test_an_overflown_slope_is_not_hidden(device):
    problem = attention_problem(device, torch.float32, 8, 3)
    slope = torch.ones(2, 3, 24, device=device)
    slope[0, 1, 2] = torch.inf
    assert not attention("triton", *problem, slope)[1].isfinite().any()


def test_no_slope_gives_no_gradient(device):
    problem = attention_problem(device, torch.float32, 8, 3)
    found = attention("triton", *problem, torch.zeros(2, 3, 24, device=device))
    assert not any(gradient.any() for gradient in found[1:])


def test_no_queries(device):
    problem = attention_problem(device, torch.float32, 8, 0)
    out, dvalue, *_ = attention("triton", *problem, torch.zeros(2, 0, 24, device=device))
    assert out.shape == (2, 0, 24)
    assert not dvalue.any()


def test_registration(device):
    (value, locations, weights), shapes, starts = attention_problem(device, torch.float32, 8, 3)
    tensors = (value, shapes, starts, locations, weights)
    slope = torch.randn(2, 3, 24).to(device)
    torch.library.opcheck(torch.ops.linsight.deformable_attention.default, tensors)
    torch.library.opcheck(
        torch.ops.linsight.deformable_attention_backward.default, (slope, *tensors)
    )
    x, target = torch.randn(5, 4).to(device), torch.arange(5, device=device)
    out, weight = torch.zeros_like(x), torch.zeros(0, device=device)
    torch.library.opcheck(
        torch.ops.linsight.sigmoid_focal_loss.default, (x, target, weight, out, 2.0, 0.25, True)
    )
