"""The Triton kernel of `conv2d`: bias and activation, in place."""

import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import launch
from .triton_math import gelu

# Elements of a program: 16 bytes a load and thread, two of them under way.
ELEMENTS, WARPS = 2048, 4


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
    if ACTIVATION == "gelu":
        value = gelu(value, EXACT)
    elif ACTIVATION == "relu":
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(at, value.to(y.dtype.element_ty), mask=ok)


def finish(y: Tensor, bias: Tensor, activation: str | None) -> None:
    """Add the bias to each pixel of `y`, (B, C, H, W) in the channels-last format, and activate."""
    channels = y.shape[1]
    pixels = y.numel() // channels
    padded = triton.next_power_of_2(channels)
    rows = max(1, ELEMENTS // padded)
    if pixels:
        launch(
            _finish, (triton.cdiv(pixels, rows),), y, bias, pixels,
            C=channels, P=padded, ROWS=rows,
            ACTIVATION=activation, EXACT=y.element_size() == 4, num_warps=WARPS,
        )  # fmt: skip
