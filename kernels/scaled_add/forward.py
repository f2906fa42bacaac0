"""The Triton kernel of `scaled_add`."""

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from .plan import plan


@triton.jit(do_not_specialize=["count", "image"])
def _forward(
    x, branch, scale, keep, out, count, image,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, SCALE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, P)[None, :]
    ok = (n < count) & (c < C)
    at = n * C + c
    term = tl.load(branch + at, mask=ok, other=0.0).to(tl.float32)
    if SCALE:
        term *= tl.load(scale + c, mask=c < C, other=0.0).to(tl.float32)
    if KEEP:
        term *= tl.load(keep + n // image, mask=n < count, other=0.0).to(tl.float32)
    total = tl.load(x + at, mask=ok, other=0.0).to(tl.float32) + term
    tl.store(out + at, total.to(out.dtype.element_ty), mask=ok)


def forward(
    x: Tensor, branch: Tensor, scale: Tensor | None, keep: Tensor | None, out: Tensor
) -> None:
    """Write x + keep * scale * branch to `out`; the maps are contiguous."""
    how = plan(x.shape, x.device, scale is not None, keep is not None)
    scale = x if scale is None else scale.contiguous()
    keep = x if keep is None else keep.contiguous()
    launch(_forward, how.forward, x, branch, scale, keep, out)
