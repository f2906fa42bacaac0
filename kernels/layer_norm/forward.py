"""The Triton kernel of `layer_norm`, `rms_norm` and `add_layer_norm`: a row lives in registers."""

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from .plan import plan


@triton.jit
def standardize(x, live, eps, C: tl.constexpr, CENTER: tl.constexpr):
    """(x - mean) / sqrt(var + eps), or the same about zero, and the factor, per row; zero beyond
    the last channel."""
    if CENTER:
        x = tl.where(live, x - (tl.sum(x, 1) * (1.0 / C))[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(x * x, 1) * (1.0 / C) + eps)[:, None]
    return x * factor, factor


@triton.jit(do_not_specialize=["tokens", "image", "eps"])
def _forward(
    x, branch, scale, keep, weight, bias, total, norm, x_n, tokens, image, eps,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    CENTER: tl.constexpr, BRANCH: tl.constexpr, SCALE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, P)[None, :]
    live = c < C
    ok = (n < tokens) & live
    at = n * C + c
    s = tl.load(x + (at if CENTER else n * x_n + c), mask=ok, other=0.0)
    if BRANCH:
        y = tl.load(branch + at, mask=ok, other=0.0).to(tl.float32)
        if SCALE:
            y *= tl.load(scale + c, mask=live, other=0.0).to(tl.float32)
        if KEEP:
            y *= tl.load(keep + n // image, mask=n < tokens, other=0.0).to(tl.float32)
        s = (s.to(tl.float32) + y).to(total.dtype.element_ty)
        tl.store(total + at, s, mask=ok)
    y, _ = standardize(s.to(tl.float32), live, eps, C, CENTER)
    y *= tl.load(weight + c, mask=live, other=0.0).to(tl.float32)
    if CENTER:
        y += tl.load(bias + c, mask=live, other=0.0).to(tl.float32)
    tl.store(norm + at, y.to(norm.dtype.element_ty), mask=ok)


def forward(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    keep: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    total: Tensor | None,
    norm: Tensor,
) -> None:
    """Write the sum to `total` if there is a branch, and its norm, or that of `x`, to `norm`.

    Without a bias the norm is `rms_norm`, of rows (N, C); else `x` is contiguous.
    """
    center = bias is not None
    given = branch is not None, scale is not None, keep is not None
    how = plan(x.shape, x.device, eps, *given, center=center)
    tensors = (
        x if t is None else t.contiguous() for t in (branch, scale, keep, weight, bias, total)
    )
    launch(_forward, how.forward, x, *tensors, norm, x.shape[-1] if center else x.stride(0))
