"""The Triton kernel that adds a convolution's bias in place, and activates."""

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from ..runtime.mathematics import activate
from .plan import plan


@triton.jit(do_not_specialize=["pixels"])
def _finish(
    y, bias, pixels,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, P)[None, :]
    ok = (n < pixels) & (c < C)
    at = y + n * C + c
    value = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    value += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    value = activate(value, ACTIVATION, EXACT)
    tl.store(at, value.to(y.dtype.element_ty), mask=ok)


def finish(y: Tensor, bias: Tensor, activation: str | None) -> None:
    """Add the bias to each pixel of `y`, (B, C, H, W) in the channels-last format, and activate."""
    if y.numel():
        launch(_finish, plan(y.shape, y.dtype, activation), y, bias)
