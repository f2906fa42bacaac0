"""The Newton inverse: each variant against its definition, Triton against both."""

import random

import pytest
import torch
from torch import Tensor

from linsight.kernels import force
from linsight.kernels.landmark_kernel.reference import gaussian_kernel
from linsight.kernels.newton_inverse import newton_inverse

from .conftest import compile_whole
from .numerics import assert_as_exact_as_eager, distance, leaves, poison_memory

METHODS = ("regularized", "normalized", "unregularized")


def landmarks_kernel(
    count: int,
    size: int,
    spread: float = 1.0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Gaussian kernels of random landmarks: the closer, the worse conditioned."""
    marks = spread * torch.randn(count, size, 8, device=device, dtype=dtype)
    return gaussian_kernel(marks, marks)


def invert_published(x: Tensor, method: str) -> Tensor:
    """Matrix by matrix, with the loop that halves alpha."""
    eye = torch.eye(x.shape[-1], dtype=x.dtype)
    if method == "regularized":
        p = x + 0.01 * eye
        v = torch.stack([1.8 / m.sum(1).max() ** 2 * (m + 0.01 * eye) for m in x])
    else:
        p = x
        alpha = 2 / x.sum(-1).max() ** 2
        for _ in range(10):
            if max((eye - m @ (alpha * m)).abs().sum(0).max() for m in x) <= 1.01:
                break
            alpha = alpha / 2
        v = alpha * x
    for _ in range(20):
        v = 2 * v - v @ p @ v
    if method == "normalized":
        d = torch.stack([torch.diag(m.sum(1) ** -0.5) for m in x])
        v = d @ v @ d
    return v


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spread", [1.0, 0.3, 0.05])
def test_reference_is_as_published(method: str, spread: float) -> None:
    torch.manual_seed(0)
    x = landmarks_kernel(6, 12, spread, dtype=torch.float64)
    y = newton_inverse(x.view(2, 3, 12, 12), method=method)
    torch.testing.assert_close(y.view(6, 12, 12), invert_published(x, method), rtol=1e-7, atol=1e-7)


def test_it_is_the_inverse_where_it_converges() -> None:
    torch.manual_seed(0)
    x = landmarks_kernel(3, 9, dtype=torch.float64)
    eye = torch.eye(9, dtype=x.dtype)
    torch.testing.assert_close(newton_inverse(x) @ (x + 0.01 * eye), eye.expand(3, 9, 9))
    torch.testing.assert_close(newton_inverse(x, method="unregularized") @ x, eye.expand(3, 9, 9))


@pytest.mark.parametrize("method", METHODS)
def test_reference_gradient(method: str) -> None:
    torch.manual_seed(0)
    x = landmarks_kernel(2, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: newton_inverse(x, method=method), x, fast_mode=True)


def test_gradient_of_what_has_not_converged() -> None:
    """The regularised one is that of an exact inverse, the others' are the iteration's own."""
    torch.manual_seed(0)
    x = landmarks_kernel(2, 12, 0.05, dtype=torch.float64).requires_grad_()
    slope = torch.randn(2, 12, 12, dtype=torch.float64)
    v = newton_inverse(x)
    (gradient,) = torch.autograd.grad(v, x, slope)
    torch.testing.assert_close(gradient, -v.mT @ slope @ v.mT)
    for method in METHODS[1:]:
        ours, wanted = (
            torch.autograd.grad(f(x, method), x, slope)[0]
            for f in (lambda x, method: newton_inverse(x, method=method), invert_published)
        )
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)


def test_one_start_for_the_whole_batch() -> None:
    torch.manual_seed(0)
    x = torch.cat([landmarks_kernel(1, 12, s, dtype=torch.float64) for s in (0.3, 0.05)])
    alone = torch.cat([newton_inverse(m[None], method="normalized") for m in x])
    assert not torch.allclose(newton_inverse(x, method="normalized"), alone)
    alone = torch.cat([newton_inverse(m[None]) for m in x])
    torch.testing.assert_close(newton_inverse(x), alone)


def test_errors_name_the_argument() -> None:
    x = torch.eye(3)
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\)"):
        newton_inverse(x[:2])
    with pytest.raises(ValueError, match=r"x is torch\.float16, expected float32"):
        newton_inverse(x.half())
    with pytest.raises(ValueError, match="method is 'exact', expected one of regularized"):
        newton_inverse(x, method="exact")
    with pytest.raises(ValueError, match="iterations is -1"):
        newton_inverse(x, iterations=-1)


def few(device: torch.device) -> int:
    """Iterations: the interpreter is slow."""
    return 4 if device.type == "cpu" else 20


# Beyond the first two sizes a matrix does not fit in one program, under the interpreter too.
@pytest.mark.triton
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("size", "large"), [(5, 49), (16, 64), (23, 200)])
def test_error_against_float64(method, size, large, device, seed) -> None:
    x = landmarks_kernel(2, size if device.type == "cpu" else large, 0.3, device)
    iterations = few(device)

    def function(x: Tensor) -> Tensor:
        return newton_inverse(x, method=method, iterations=iterations)

    assert_as_exact_as_eager(function, [x], torch.float32, torch.randn_like(x))


@pytest.mark.triton
@pytest.mark.parametrize(("size", "spread"), [(12, 0.05), (19, 0.3)])
def test_all_twenty_iterations_of_a_bad_matrix(size, spread, device, seed) -> None:
    """Newton's iteration forgives the error before, and nothing here may stop it from that."""
    x = landmarks_kernel(1, size, spread, device)
    assert_as_exact_as_eager(newton_inverse, [x], torch.float32, torch.randn_like(x))


@pytest.mark.triton
def test_random_shapes(random_cases, device, seed) -> None:
    draw = random.Random(seed)
    for _ in random_cases:
        # Not 2: of two equal row sums the largest is the largest eigenvalue, and the start
        # without a ridge stands on the border of convergence, where rounding decides.
        size = draw.choice((1, 3, 7, 13) if device.type == "cpu" else (1, 3, 31, 53, 65, 131))
        method, spread = draw.choice(METHODS), draw.choice((1.0, 0.3))
        print(size, method, spread)
        x = landmarks_kernel(draw.choice((1, 3)), size, spread, device)
        iterations = few(device)

        def function(x: Tensor, method: str = method, iterations: int = iterations) -> Tensor:
            return newton_inverse(x, method=method, iterations=iterations)

        assert_as_exact_as_eager(function, [x], torch.float32, torch.randn_like(x))


def test_autocast_is_kept_out() -> None:
    x = landmarks_kernel(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        y = newton_inverse(x)
    torch.testing.assert_close(y, newton_inverse(x), rtol=0, atol=0)


@pytest.mark.triton
def test_equal_landmarks_are_survived(device) -> None:
    """Ones in every place: no inverse, but a ridge."""
    with force("triton"):
        for method in METHODS:
            x = torch.ones(1, 9, 9, device=device, requires_grad=True)
            y = newton_inverse(x, method=method, iterations=few(device))
            y.sum().backward()
            assert y.isfinite().all()
            assert x.grad.isfinite().all()


@pytest.mark.triton
def test_every_element_is_written(device, monkeypatch) -> None:
    poison_memory(monkeypatch)
    for size in (5, 17):
        for method in METHODS:
            (x,) = leaves([landmarks_kernel(2, size, 1.0, device)], torch.float32)
            with force("triton"):
                y = newton_inverse(x, method=method, iterations=2)
                (gradient,) = torch.autograd.grad(y.sum(), x)
            assert y.isfinite().all()
            assert gradient.isfinite().all()


@pytest.mark.triton
def test_registration(device) -> None:
    x = landmarks_kernel(2, 5, device=device).requires_grad_()
    alpha = torch.tensor([0.1, 0.2], device=device)
    operators = torch.ops.linsight
    torch.library.opcheck(operators.newton_implicit.default, (x, alpha, 0.01, 2))
    torch.library.opcheck(operators.newton_unrolled.default, (x, alpha.requires_grad_(), 0.0, 2))
    torch.library.opcheck(operators.newton_residuals.default, (x.detach(), alpha.detach()))


@pytest.mark.triton
@pytest.mark.parametrize("method", ["regularized", "normalized"])
@pytest.mark.slow
def test_compiles_without_a_graph_break(method, device) -> None:
    def function(x: Tensor) -> Tensor:
        return newton_inverse(x, method=method, iterations=2) * 2

    whole = compile_whole(function)
    for count, size in ((2, 4), (3, 6), (4, 9)):
        x = landmarks_kernel(count, size, device=device).requires_grad_()
        with force("triton"):
            y, z = function(x), whole(x)
            slope = torch.randn_like(y)
            assert distance(z, y.double()) < 1e-5
            grad, expected = (torch.autograd.grad(r, x, slope)[0] for r in (z, y))
            assert distance(grad, expected.double()) < 1e-5
