"""Gaussian attention: the reference against the equation, the Triton kernels against both."""

import random

import pytest
import torch
from torch import Tensor

from linsight.kernels import force
from linsight.kernels.gaussian_attention import gaussian_attention
from linsight.kernels.landmark_kernel import landmark_kernel

from .conftest import compile_whole
from .numerics import assert_as_exact_as_eager, distance, leaves, poison_memory

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def case(
    tokens: int,
    marks: int,
    width: int,
    device: torch.device | str = "cpu",
    magnitude: float = 0.5,
    batch: int = 1,
    heads: int = 2,
) -> list[Tensor]:
    """q and v sliced out of a packed projection, landmarks among the queries, the rest."""
    packed = torch.randn(batch, tokens, 2, heads, width, device=device)
    packed[:, :, 0] *= magnitude
    query, value = packed.unbind(2)
    near = 0.2 * magnitude * torch.randn(batch, marks, heads, width, device=device)
    landmarks = query[:, torch.arange(marks, device=device) % tokens] + near
    inverse = torch.randn(batch, heads, marks, marks, device=device)
    return [query, landmarks, value, inverse, torch.randn_like(value)]


def attend(q: Tensor, k: Tensor, v: Tensor, inverse: Tensor, local: Tensor | None = None) -> Tensor:
    """The operator, with an inverse of 32 bits or more whatever the others' dtype."""
    inverse = inverse.to(torch.promote_types(inverse.dtype, torch.float32))
    return gaussian_attention(q, k, v, inverse, local, scale=0.7)


def test_reference_is_the_equation() -> None:
    torch.manual_seed(0)
    q, k, v, inverse, local = (x.double() for x in case(7, 3, 4, batch=2))
    y = gaussian_attention(q, k, v, inverse, local, scale=0.7)
    for b in range(2):
        for h in range(2):
            kernel = torch.stack(
                [
                    torch.stack([(-0.5 * (0.7 * i - j).square().sum()).exp() for j in k[b, :, h]])
                    for i in q[b, :, h]
                ]
            )
            wanted = kernel @ inverse[b, h] @ kernel.T @ v[b, :, h] + local[b, :, h]
            torch.testing.assert_close(y[b, :, h], wanted)


def test_every_token_a_landmark_leaves_the_kernel() -> None:
    """K K^-1 K = K."""
    torch.manual_seed(0)
    q, _, v, _, _ = (x.double() for x in case(6, 6, 8, magnitude=1.0))
    kernel = landmark_kernel(q)
    wanted = (kernel @ v.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(gaussian_attention(q, q, v, torch.linalg.inv(kernel)), wanted)


def test_reference_gradient() -> None:
    torch.manual_seed(0)
    tensors = [x.double().requires_grad_() for x in case(5, 3, 4)]
    assert torch.autograd.gradcheck(gaussian_attention, tensors, fast_mode=True)
    assert torch.autograd.gradcheck(landmark_kernel, tensors[1], fast_mode=True)


def test_errors_name_the_argument() -> None:
    q, k, v, inverse, local = case(5, 3, 4)
    with pytest.raises(ValueError, match="query has shape"):
        gaussian_attention(q[0], k, v, inverse)
    with pytest.raises(ValueError, match="landmarks has shape"):
        gaussian_attention(q, k[..., :2], v, inverse)
    with pytest.raises(ValueError, match="value has shape"):
        gaussian_attention(q, k, v[:, :2], inverse)
    with pytest.raises(ValueError, match=r"inverse has shape .*, expected \(1, 2, 3, 3\)"):
        gaussian_attention(q, k, v, inverse[..., :2])
    with pytest.raises(ValueError, match="local has shape"):
        gaussian_attention(q, k, v, inverse, local[:, :2])
    with pytest.raises(ValueError, match=r"value is torch\.float64, but query is torch\.float32"):
        gaussian_attention(q, k, v.double(), inverse)
    with pytest.raises(ValueError, match=r"landmarks has shape \(3, 2, 4\)"):
        landmark_kernel(k[0])
    with pytest.raises(ValueError, match=r"inverse is torch\.float16"):
        gaussian_attention(q, k, v, inverse.half())


# The first numbers are for the interpreter; 17 and 81 landmarks take two programs.
@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("marks", "many"), [(5, 49), (17, 81)])
def test_error_against_float64(marks, many, dtype, device, seed) -> None:
    small = device.type == "cpu"
    tensors = case(21, marks, 32, device) if small else case(3136, many, 32, device, batch=4)
    assert_as_exact_as_eager(attend, tensors, dtype, torch.randn_like(tensors[0]))


@pytest.mark.triton
@pytest.mark.parametrize(("width", "dtype"), [(24, torch.float16), (64, torch.bfloat16)])
def test_head_widths(width, dtype, device, seed) -> None:
    tensors = case(19, 6, width, device, heads=1)
    assert_as_exact_as_eager(attend, tensors, dtype, torch.randn_like(tensors[0]))


@pytest.mark.triton
@pytest.mark.parametrize(("marks", "dtype"), [(5, torch.float32), (37, torch.bfloat16)])
def test_landmark_kernel(marks, dtype, device, seed) -> None:
    """Its result is of 32 bits, whatever the landmarks'."""
    packed = torch.randn(2, marks, 2, 3, 24, device=device).to(dtype)
    packed[:, 1::3] = packed[:, :1]  # some that are equal
    slope = torch.randn(2, 3, marks, marks, device=device)
    outcomes = {}
    for choice, kind in (("reference", torch.float64), ("reference", dtype), ("triton", dtype)):
        (x,) = leaves([0.3 * packed[:, :, 0]], kind)
        with force(choice):
            y = landmark_kernel(x)
            (gradient,) = torch.autograd.grad(y, x, slope.to(y.dtype))
        assert gradient.dtype == kind
        outcomes[choice, kind] = y.detach(), gradient
    ours, eager = outcomes["triton", dtype], outcomes["reference", dtype]
    truth = outcomes["reference", torch.float64]
    assert ours[0].diagonal(dim1=2, dim2=3).eq(1).all()
    rounding = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps
    for got, same, wanted, eps in zip(ours, eager, truth, rounding, strict=True):
        assert distance(got, wanted) <= 3 * max(distance(same, wanted), 2 * eps)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [96, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_heads(width, dtype, device, seed) -> None:
    tensors = case(300, 70, width, device, magnitude=0.3)
    assert_as_exact_as_eager(attend, tensors, dtype, torch.randn_like(tensors[0]))


@pytest.mark.triton
def test_random_shapes(random_cases, device, seed) -> None:
    draw = random.Random(seed)
    for _ in random_cases:
        shape = (draw.choice((1, 2, 17, 31)), draw.choice((1, 3, 17)), draw.choice((16, 32, 40)))
        extras, dtype = draw.choice((4, 5)), draw.choice(DTYPES[:2])
        print(shape, extras, dtype)
        tensors = case(*shape, device, batch=draw.choice((1, 2)), heads=draw.choice((1, 3)))
        # Where one token is all there is, its own landmark's terms cancel but for rounding.
        assert_as_exact_as_eager(
            attend, tensors[:extras], dtype, torch.randn_like(tensors[0]), roundings=8
        )


@pytest.mark.triton
def test_large_values_and_zeros(device, seed) -> None:
    tensors = case(23, 6, 32, device, magnitude=7.0, heads=1)
    tensors[0].clamp_(-20, 20)
    tensors[0][:, ::3] = 0
    tensors[1] = tensors[0][:, :6].clone()
    tensors[2][:, ::5] = 0
    slope = torch.randn_like(tensors[0])
    # Squared lengths reach thousands, and an exponent is off by as many roundings.
    for dtype, roundings in ((torch.float32, 2000), (torch.bfloat16, 1)):
        assert_as_exact_as_eager(attend, tensors, dtype, slope, roundings)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_landmarks_as_far_apart_as_half_precision_reaches(dtype, device, seed) -> None:
    """Their kernel is the identity, without a gradient: nothing overflows on the way."""
    x = (6e4 * torch.rand(1, 17, 2, 8, device=device)).to(dtype).requires_grad_()
    with force("triton"):
        kernel = landmark_kernel(x)
        (gradient,) = torch.autograd.grad(kernel.sum(), x)
    assert torch.equal(kernel, torch.eye(17, device=device).expand(1, 2, 17, 17))
    assert not gradient.any()


@pytest.mark.triton
def test_every_element_is_written(device, monkeypatch) -> None:
    poison_memory(monkeypatch)
    for marks in (5, 18):
        tensors = leaves(case(35, marks, 24, device), torch.float32)
        with force("triton"):
            y = gaussian_attention(*tensors) + landmark_kernel(tensors[1]).sum()
            gradients = torch.autograd.grad(y.sum(), tensors)
        assert all(x.isfinite().all() for x in (y, *gradients))


@pytest.mark.triton
def test_registration(device) -> None:
    tensors = [x.requires_grad_() for x in case(6, 3, 16, device)]
    operator = torch.ops.linsight.gaussian_attention.default
    torch.library.opcheck(operator, (*tensors[:4], None, 0.7))
    torch.library.opcheck(operator, (*tensors, 1.0))
    torch.library.opcheck(torch.ops.linsight.landmark_kernel.default, (tensors[1],))


@pytest.mark.triton
@pytest.mark.slow
def test_compiles_without_a_graph_break(device) -> None:
    def function(*tensors: Tensor) -> Tensor:
        return gaussian_attention(*tensors) * 2

    whole = compile_whole(function)
    for tokens, marks in ((12, 3), (35, 5), (20, 4)):
        tensors = [x.requires_grad_() for x in case(tokens, marks, 16, device)]
        with force("triton"):
            y, z = function(*tensors), whole(*tensors)
            slope = torch.randn_like(y)
            torch.testing.assert_close(z, y)
            torch.testing.assert_close(
                *(torch.autograd.grad(result, tensors, slope) for result in (z, y))
            )


@pytest.mark.triton
def test_autocast_keeps_the_dtype_of_the_query(device) -> None:
    q, k, v, inverse, local = case(9, 4, 16, device)
    results = []
    for choice in ("reference", "triton"):
        with force(choice), torch.autocast(device.type, torch.bfloat16):
            results.append(
                gaussian_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), inverse, local)
            )
        assert results[-1].dtype == torch.bfloat16
    assert distance(results[1], results[0].double()) < 0.01
