"""The registration of `window_pool`; Triton is imported at the first launch."""

from ..runtime.dispatch import rows_contiguous
from ..runtime.operator import Operator
from ..runtime.program import cache_launches


@cache_launches
def _run(x, heads, window, dilations):
    from .forward import forward
    from .plan import plan

    out = _run_fake(x, heads, window, dilations)
    x = rows_contiguous(x)
    forward(plan(x.shape, x.device, heads, window, tuple(dilations)), x, out)
    return out


def _run_fake(x, heads, window, dilations):
    batch, _, _, channels = x.shape
    shares = len(dilations)
    return x.new_empty(shares, batch, window**2, heads, channels // (shares * heads))


@cache_launches
def _run_backward(grad, height, width, window, dilations):
    from .backward import backward
    from .plan import plan

    out = _run_backward_fake(grad, height, width, window, dilations)
    how = plan(out.shape, out.device, grad.shape[3], window, tuple(dilations))
    backward(how, grad.contiguous(), out)
    return out


def _run_backward_fake(grad, height, width, window, dilations):
    shares, batch, _, heads, depth = grad.shape
    return grad.new_empty(batch, height, width, shares * heads * depth)


def _save(ctx, inputs, output):
    x, _, ctx.window, ctx.dilations = inputs
    ctx.size = x.shape[1:3]


def _differentiate(ctx, grad):
    return _backward(grad, *ctx.size, ctx.window, ctx.dilations), None, None, None


window_pool = Operator(
    "window_pool",
    _run,
    _save,
    _differentiate,
    schema="(Tensor x, int heads, int window, int[] dilations) -> Tensor",
    fake=_run_fake,
)
_backward = Operator(
    "window_pool_backward",
    _run_backward,
    schema="(Tensor grad, SymInt height, SymInt width, int window, int[] dilations) -> Tensor",
    fake=_run_backward_fake,
)
