"""Batch norm: the reference against PyTorch's module, Triton against both."""

import random
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linsight.kernels import force
from linsight.kernels.batch_norm import batch_norm

from .conftest import INTERPRETED, compile_whole
from .numerics import RESULT, ROUNDINGS, assert_as_exact_as_eager, distance, leaves, poison_memory

CPU = torch.device("cpu")
ACTIVATIONS = (None, "gelu", "relu")


def case(shape: tuple[int, ...], device: torch.device, mean: float = 0.0) -> list[Tensor]:
    """The map, channels-last, weight and bias."""
    x = (torch.randn(shape, device=device) + mean).to(memory_format=torch.channels_last)
    weight, bias = (1 + 0.3 * torch.randn(shape[1], device=device) for _ in range(2))
    return [x, weight, bias]


def initial_statistics(x: Tensor) -> list[Tensor]:
    """Running mean and variance as a new module has them."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return [make(x.shape[1], dtype=wide, device=x.device) for make in (torch.zeros, torch.ones)]


def norm_with(activation: str | None = None):
    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        statistics = initial_statistics(x)
        weight, bias = (t.to(statistics[0].dtype) for t in (weight, bias))
        return batch_norm(x, weight, bias, *statistics, activation=activation)

    return function


def with_sums(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, addend: Tensor) -> Tensor:
    """The norm with residual * x and an addend."""
    statistics = initial_statistics(x)
    weight, bias = (t.to(statistics[0].dtype) for t in (weight, bias))
    return batch_norm(x, weight, bias, *statistics, residual=residual, addend=addend)


def sum_case(shape: tuple[int, ...], device: torch.device, mean: float = 0.0) -> list[Tensor]:
    """The tensors of `with_sums`."""
    addend = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
    return [*case(shape, device, mean), torch.randn(shape[1], device=device), addend]


def slope(x: Tensor) -> Tensor:
    return torch.randn_like(x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_pytorchs(activation: str | None) -> None:
    torch.manual_seed(0)
    module = nn.BatchNorm2d(6, momentum=0.3, eps=1e-3).double()
    x, weight, bias = (t.double() for t in case((3, 6, 4, 5), CPU, 2.0))
    module.weight.data, module.bias.data = weight, bias
    expected = module(x)
    mean, var = initial_statistics(x)
    found = batch_norm(x, weight, bias, mean, var, momentum=0.3, eps=1e-3, activation=activation)
    if activation is not None:
        expected = getattr(F, activation)(expected)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(mean, module.running_mean)
    torch.testing.assert_close(var, module.running_var)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_reference_gradient(activation: str | None) -> None:
    torch.manual_seed(0)
    tensors = [t.double().requires_grad_() for t in case((2, 3, 4, 2), CPU)]
    assert torch.autograd.gradcheck(norm_with(activation), tensors, fast_mode=True)


def test_sums_are_pytorchs() -> None:
    torch.manual_seed(0)
    tensors = [t.double().requires_grad_() for t in sum_case((2, 3, 4, 2), CPU)]
    x, weight, bias, residual, addend = tensors
    norm = F.batch_norm(x, None, None, weight, bias, training=True)
    expected = norm + residual[:, None, None] * x + addend
    torch.testing.assert_close(with_sums(*tensors), expected)
    running = torch.zeros_like(weight), torch.ones_like(weight)
    found = batch_norm(x, weight, bias, *running, training=False, residual=residual, addend=addend)
    norm = F.batch_norm(x, *running, weight, bias)
    torch.testing.assert_close(found, norm + residual[:, None, None] * x + addend)
    assert torch.autograd.gradcheck(with_sums, tensors, fast_mode=True)


def test_errors_name_the_argument() -> None:
    x, weight, bias = case((2, 8, 3, 3), CPU)
    statistics = initial_statistics(x)
    with pytest.raises(ValueError, match=r"x has shape \(8, 3, 3\), expected \(B, C, H, W\)"):
        batch_norm(x[0], weight, bias, *statistics)
    with pytest.raises(ValueError, match=r"bias has shape \(7,\), expected \(8,\)"):
        batch_norm(x, weight, bias[:7], *statistics)
    with pytest.raises(ValueError, match="activation is 'silu'"):
        batch_norm(x, weight, bias, *statistics, activation="silu")
    with pytest.raises(ValueError, match=r"residual has shape \(7,\), expected \(8,\)"):
        batch_norm(x, weight, bias, *statistics, residual=weight[:7])
    with pytest.raises(ValueError, match="there is no activation, got 'relu'"):
        batch_norm(x, weight, bias, *statistics, residual=weight, activation="relu")
    with pytest.raises(ValueError, match=r"addend is torch\.float64 of shape .* as x is"):
        batch_norm(x, weight, bias, *statistics, addend=x.double())
    with pytest.raises(ValueError, match="one value per channel has no variance"):
        batch_norm(x[:1, :, :1, :1], weight, bias, *statistics)
    torch.testing.assert_close(statistics, initial_statistics(x))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_against_float64(activation, dtype, device, seed) -> None:
    shape = (2, 32, 9, 12) if device.type == "cpu" else (16, 32, 112, 112)
    tensors = case(shape, device)
    assert_as_exact_as_eager(norm_with(activation), tensors, dtype, slope(tensors[0]))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_of_sums_against_float64(dtype, device, seed) -> None:
    shape = (2, 32, 9, 12) if device.type == "cpu" else (64, 96, 56, 56)
    tensors = sum_case(shape, device, 1.0)
    assert_as_exact_as_eager(with_sums, tensors, dtype, slope(tensors[0]))


@pytest.mark.triton
def test_random_shapes_and_means(random_cases, device, seed) -> None:
    draw = random.Random(seed)
    for _ in random_cases:
        size = draw.choice((1, 7, 56)), draw.choice((2, 13, 31))
        shape = (draw.choice((1, 2, 5)), draw.choice((1, 3, 24, 96, 320, 640)), *size)
        mean, activation = draw.choice((0.0, 20.0)), draw.choice(ACTIVATIONS)
        print(shape, mean, activation)
        tensors = case(shape, device, mean)
        # Of few values all is rounding, once a mean twenty deviations off is taken from them.
        roundings = 256 if mean else 16
        gradient = slope(tensors[0])
        if shape[1] < 8:  # a vector of few sums, whose terms should not cancel
            gradient = gradient.abs() + tensors[0] - mean
        assert_as_exact_as_eager(norm_with(activation), tensors, torch.float32, gradient, roundings)


@pytest.mark.triton
@pytest.mark.parametrize("value", [0.0, -20.0, 20.0])
def test_a_constant_map_is_its_bias(value, device) -> None:
    x, weight, bias = case((2, 5, 4, 6), device)
    x.fill_(value)
    with force("triton"):
        y = batch_norm(x, weight, bias, *initial_statistics(x))
    torch.testing.assert_close(y, bias[:, None, None].expand_as(y))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_statistics(dtype, device, seed) -> None:
    """Of a mean far from zero, and one pixel of the map far from that."""
    x, weight, bias = case((2, 40, 33, 17), device, 20.0)
    x[0, :, 0, 0] = -20.0
    x = x.to(dtype)
    results = []
    for choice, cast in (("reference", torch.double), ("reference", dtype), ("triton", dtype)):
        statistics = initial_statistics(x.to(cast))
        with force(choice):
            wide = [t.to(statistics[0].dtype) for t in (weight, bias)]
            batch_norm(x.to(cast), *wide, *statistics, momentum=0.4)
        results.append(statistics)
    for exact, eager, ours in zip(*results, strict=True):
        assert distance(ours, exact) <= RESULT * max(distance(eager, exact), 1e-6)


def evaluate(x, weight, bias, mean, var, activation, choice):
    with force(choice), torch.inference_mode():
        return batch_norm(x, weight, bias, mean, var, training=False, activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_evaluation_is_pytorchs(activation: str | None) -> None:
    torch.manual_seed(0)
    tensors = [t.double().requires_grad_() for t in case((2, 6, 3, 5), CPU)]
    mean, var = torch.randn(6).double(), torch.rand(6).double() + 0.1
    before = mean.clone(), var.clone()
    expected = F.batch_norm(tensors[0], mean, var, *tensors[1:])
    expected = expected if activation is None else getattr(F, activation)(expected)
    found = batch_norm(*tensors, mean, var, training=False, activation=activation)
    torch.testing.assert_close(found, expected)
    found, expected = (torch.autograd.grad(y.square().sum(), tensors) for y in (found, expected))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close((mean, var), before)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_of_evaluation_against_float64(activation, dtype, device, seed) -> None:
    for shape in ((2, 40, 7, 5), (1, 3, 1, 1)):
        x, weight, bias = case(shape, device)
        x, mean = x.to(dtype), torch.randn_like(weight)
        vectors = [weight, bias, mean, torch.rand_like(mean) + 0.1]
        exact = evaluate(x.double(), *(t.double() for t in vectors), activation, "reference")
        eager, ours = (evaluate(x, *vectors, activation, c) for c in ("reference", "triton"))
        assert ours.dtype == dtype
        assert ours.is_contiguous(memory_format=torch.channels_last)
        slack = 2.0 if INTERPRETED and dtype == torch.bfloat16 else 1.0
        floor = ROUNDINGS[dtype] * torch.finfo(dtype).eps
        allowed = slack * RESULT * max(distance(eager, exact), floor)
        assert distance(ours, exact) <= allowed


@pytest.mark.triton
def test_evaluation_with_a_gradient(device, seed) -> None:
    tensors = leaves(case((2, 6, 3, 5), device), torch.float32)
    mean, var = torch.randn(6, device=device), torch.rand(6, device=device) + 0.1
    results = []
    for choice in ("reference", "triton"):
        with force(choice):
            y = batch_norm(*tensors, mean, var, training=False, activation="gelu")
            results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "choice", ["reference", pytest.param("triton", marks=[pytest.mark.triton, pytest.mark.slow])]
)
def test_two_processes(choice, tmp_path) -> None:
    """Two processes with a part of the batch each give what one has of the whole batch."""
    if choice == "triton" and not INTERPRETED:
        pytest.skip("two processes share no GPU")
    torch.multiprocessing.spawn(run_process, (choice, str(tmp_path / "rendezvous")), nprocs=2)


def run_process(rank: int, choice: str, rendezvous: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    dtype = torch.float64 if choice == "reference" else torch.float32
    # Equal parts, unequal ones, and one without a value.
    for sizes, activation in product([(3, 3), (1, 4), (0, 5)], ACTIVATIONS):
        x, weight, bias = (t.to(dtype) for t in case((sum(sizes), 5, 3, 4), CPU, 2.0))
        slopes = torch.randn_like(x)
        module = nn.BatchNorm2d(5, momentum=0.3).to(dtype)
        module.weight.data, module.bias.data = weight.clone(), bias.clone()
        whole = x.clone().requires_grad_()
        expected = module(whole)
        residual = torch.randn(5, dtype=dtype, requires_grad=True) if activation is None else None
        if residual is None:
            expected = getattr(F, activation)(expected)
        else:
            expected = expected + residual[:, None, None] * whole
        (expected * slopes).sum().backward()

        part, vectors = x.split(sizes)[rank].clone(), [weight.clone(), bias.clone()]
        vectors += [] if residual is None else [residual.detach().clone()]
        tensors = [t.requires_grad_() for t in (part, *vectors)]
        mean, var = (t.to(dtype) for t in initial_statistics(x))
        group = torch.distributed.group.WORLD
        with force(choice):
            y = batch_norm(
                *tensors[:3], mean, var, momentum=0.3, activation=activation,
                residual=vectors[2] if residual is not None else None, process_group=group,
            )  # fmt: skip
        (y * slopes.split(sizes)[rank]).sum().backward()
        # The gradients of the vectors are this process's part of the whole.
        for vector in vectors:
            torch.distributed.all_reduce(vector.grad)
        found = [y, part.grad, *(v.grad for v in vectors), mean, var]
        wanted = [
            expected.split(sizes)[rank], whole.grad.split(sizes)[rank],
            module.weight.grad, module.bias.grad,
            *([] if residual is None else [residual.grad]),
            module.running_mean, module.running_var,
        ]  # fmt: skip
        torch.testing.assert_close(found, wanted)
    torch.distributed.destroy_process_group()


@pytest.mark.triton
def test_vectors_with_strides(device, seed) -> None:
    """Weight, bias and residual that are columns of a matrix, against copies of them."""
    x, *vectors, addend = sum_case((2, 12, 5, 4), device)
    columns = [v.repeat_interleave(3)[::3] for v in vectors]
    gradient = slope(x)
    results = []
    for each in (columns, vectors):
        tensors = [t.detach().requires_grad_() for t in (x, *each, addend)]
        with force("triton"):
            y = with_sums(*tensors)
            results.append([y, *torch.autograd.grad(y, tensors, gradient)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.triton
def test_running_statistics_with_strides(device, seed) -> None:
    """They move in place where they lie, and nothing beside them does."""
    x, weight, bias = case((2, 12, 5, 4), device)
    dense = initial_statistics(x)
    columns = [torch.stack((t, t, t), 1) for t in dense]
    before = [t.clone() for t in columns]
    with force("triton"):
        for _ in range(2):  # The second call repeats the launches of the first.
            batch_norm(x, weight, bias, *dense)
            batch_norm(x, weight, bias, *(t[:, 1] for t in columns))
    for moved, expected, old in zip(columns, dense, before, strict=True):
        assert torch.equal(moved[:, 1], expected)
        assert torch.equal(moved[:, ::2], old[:, ::2])


@pytest.mark.triton
def test_every_element_is_written(device, monkeypatch) -> None:
    poison_memory(monkeypatch)
    tensors = leaves(case((3, 40, 7, 5), device), torch.float32)
    with force("triton"):
        y = norm_with("gelu")(*tensors)
        gradients = torch.autograd.grad(y.sum(), tensors)
    assert all(x.isfinite().all() for x in (y, *gradients))
    tensors = leaves(sum_case((3, 40, 7, 5), device), torch.float32)
    with force("triton"):
        y = with_sums(*tensors)
        gradients = torch.autograd.grad(y.sum(), tensors)
    assert all(x.isfinite().all() for x in (y, *gradients))


@pytest.mark.triton
def test_a_channels_first_map(device, seed) -> None:
    """And a gradient that is: the same as of channels-last ones."""
    x, weight, bias = case((2, 6, 5, 4), device)
    results = []
    for format in (torch.channels_last, torch.contiguous_format):
        tensors = leaves([x.contiguous(memory_format=format), weight, bias], torch.float32)
        with force("triton"):
            y = norm_with("gelu")(*tensors)
            gradient = x.cos().contiguous(memory_format=format)
            results.append([y, *torch.autograd.grad(y, tensors, gradient)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.triton
def test_compiles_without_a_graph_break(device) -> None:
    whole = compile_whole(norm_with("gelu"))
    for size in (2, 3, 5):
        tensors = leaves(case((2, 8, size, size + 1), device), torch.float32)
        with force("triton"):
            results = [function(*tensors) for function in (norm_with("gelu"), whole)]
        torch.testing.assert_close(*results)
        gradients = [torch.autograd.grad(y.square().sum(), tensors) for y in results]
        torch.testing.assert_close(*gradients)
