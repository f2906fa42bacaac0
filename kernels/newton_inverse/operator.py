"""The registration of the Newton-Schulz iteration; Triton is imported at the first launch."""

from torch import Tensor

from ..runtime.operator import Operator


def _run(x: Tensor, alpha: Tensor, ridge: float, iterations: int) -> Tensor:
    from .forward import iterate

    return iterate(x.contiguous(), alpha.contiguous(), ridge, iterations)


def _run_fake(x, alpha, ridge, iterations):
    return x.new_empty(x.shape)


def _run_implicit_backward(grad: Tensor, v: Tensor) -> Tensor:
    from .backward import implicit_gradient

    return implicit_gradient(grad.contiguous(), v)


def _run_unrolled_backward(
    grad: Tensor, x: Tensor, alpha: Tensor, ridge: float, iterations: int
) -> tuple[Tensor, Tensor]:
    from .backward import unrolled_gradient

    return unrolled_gradient(
        grad.contiguous(), x.contiguous(), alpha.contiguous(), ridge, iterations
    )


def _run_residuals(x: Tensor, alphas: Tensor) -> Tensor:
    from .forward import residuals

    return residuals(x.contiguous(), alphas.contiguous())


def _save_implicit(ctx, inputs, output):
    ctx.save_for_backward(output)


def _differentiate_implicit(ctx, grad):
    return _implicit_backward(grad, *ctx.saved_tensors), None, None, None


def _save_unrolled(ctx, inputs, output):
    x, alpha, ctx.ridge, ctx.iterations = inputs
    ctx.save_for_backward(x, alpha)


def _differentiate_unrolled(ctx, grad):
    dx, dalpha = _unrolled_backward(grad, *ctx.saved_tensors, ctx.ridge, ctx.iterations)
    return dx, dalpha, None, None


def _count_product(x) -> int:
    """One product of all the matrices (B, M, M)."""
    return 2 * x[0] * x[1] ** 3


def _count_iterations(x, alpha, ridge, iterations, *_, **__) -> int:
    return 2 * iterations * _count_product(x)


def _count_implicit_backward(grad, v, *_, **__) -> int:
    return 2 * _count_product(v)


def _count_unrolled_backward(grad, x, alpha, ridge, iterations, *_, **__) -> int:
    return 4 * iterations * _count_product(x)


def _count_residuals(x, *_, **__) -> int:
    return _count_product(x)


iterate_implicitly = Operator(
    "newton_implicit",
    _run,
    _save_implicit,
    _differentiate_implicit,
    schema="(Tensor x, Tensor alpha, float ridge, int iterations) -> Tensor",
    fake=_run_fake,
    flops=_count_iterations,
)
_implicit_backward = Operator(
    "newton_implicit_backward",
    _run_implicit_backward,
    schema="(Tensor grad, Tensor v) -> Tensor",
    fake=lambda grad, v: v.new_empty(v.shape),
    flops=_count_implicit_backward,
)
iterate = Operator(
    "newton_unrolled",
    _run,
    _save_unrolled,
    _differentiate_unrolled,
    schema="(Tensor x, Tensor alpha, float ridge, int iterations) -> Tensor",
    fake=_run_fake,
    flops=_count_iterations,
)
_unrolled_backward = Operator(
    "newton_unrolled_backward",
    _run_unrolled_backward,
    schema="(Tensor grad, Tensor x, Tensor alpha, float ridge, int iterations) -> (Tensor, Tensor)",
    fake=lambda grad, x, alpha, ridge, iterations: (
        x.new_empty(x.shape),
        alpha.new_empty(alpha.shape),
    ),
    flops=_count_unrolled_backward,
)
residuals = Operator(
    "newton_residuals",
    _run_residuals,
    schema="(Tensor x, Tensor alphas) -> Tensor",
    fake=lambda x, alphas: x.new_empty(x.shape[0], alphas.shape[0]),
    flops=_count_residuals,
)
