"""The Triton kernels of `projected_softmax_attention`: its last sum and its gate, in one pass."""

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from .plan import plan

SCALARS = ["count", "tokens", "heads"]


@triton.jit
def _heads(x, vector, tokens, heads, x_b, x_n, x_h):
    """Pointers to the given vectors of (B, N, heads, D)."""
    token = vector // heads
    b = token // tokens
    return x + b * x_b + (token - b * tokens) * x_n + (vector - token * heads) * x_h


@triton.jit
def _load(
    y, local, gate, y_b, y_n, y_h, g_b, g_n, g_h, count, tokens, heads,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y + local and the gate in float32, and their offsets in a contiguous tensor."""
    vector = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, P)[None, :]
    ok = (vector < count)[:, None] & (d < D)
    dense = vector[:, None] * D + d
    at = _heads(y, vector, tokens, heads, y_b, y_n, y_h)
    term = tl.load(at[:, None] + d, mask=ok, other=0.0).to(tl.float32)
    term += tl.load(local + dense, mask=ok, other=0.0).to(tl.float32)
    at = _heads(gate, vector, tokens, heads, g_b, g_n, g_h)
    factor = tl.load(at[:, None] + d, mask=ok, other=0.0).to(tl.float32)
    return term, factor, dense, ok


@triton.jit(do_not_specialize=SCALARS)
def _finish(
    y, local, gate, out, y_b, y_n, y_h, g_b, g_n, g_h, count, tokens, heads,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(y + local) * gate."""
    term, factor, dense, ok = _load(
        y, local, gate, y_b, y_n, y_h, g_b, g_n, g_h, count, tokens, heads, D, P, BLOCK
    )
    tl.store(out + dense, (term * factor).to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=SCALARS)
def _finish_gradient(
    grad, y, local, gate, dterms, dgate, y_b, y_n, y_h, g_b, g_n, g_h, count, tokens, heads,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of both terms of the sum, which is the same, and of the gate."""
    term, factor, dense, ok = _load(
        y, local, gate, y_b, y_n, y_h, g_b, g_n, g_h, count, tokens, heads, D, P, BLOCK
    )
    slope = tl.load(grad + dense, mask=ok, other=0.0).to(tl.float32)
    tl.store(dterms + dense, (slope * factor).to(dterms.dtype.element_ty), mask=ok)
    tl.store(dgate + dense, (slope * term).to(dgate.dtype.element_ty), mask=ok)


def finish(y: Tensor, local: Tensor, gate: Tensor, out: Tensor) -> None:
    """Write (y + local) * gate to `out`, which may be `local`."""
    how = plan(out.shape).finish
    launch(_finish, how, y, local, gate, out, *y.stride()[:3], *gate.stride()[:3])


def finish_gradient(
    grad: Tensor, y: Tensor, local: Tensor, gate: Tensor, dterms: Tensor, dgate: Tensor
) -> None:
    """Write the gradients of the sum's terms and of the gate; `dgate` may be `local`."""
    how = plan(grad.shape).finish
    strides = (*y.stride()[:3], *gate.stride()[:3])
    launch(_finish_gradient, how, grad, y, local, gate, dterms, dgate, *strides)
