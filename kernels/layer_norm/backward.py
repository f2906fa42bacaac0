"""The Triton kernel of the gradients of `layer_norm`, `rms_norm` and `add_layer_norm`.

Mean and variance are cheaper to compute again than to store. The gradients of the vectors are
summed in a fixed order, in two stages, of which the second is PyTorch's: it costs the host less
than another launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from .forward import standardize
from .plan import plan


@triton.jit(do_not_specialize=["tokens", "image", "eps"])
def _backward(
    dtotal, dnorm, x, branch, scale, keep, weight, dx, dbranch, parts, x_n, tokens, image, eps,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, CENTER: tl.constexpr,
    TOTAL: tl.constexpr, SCALE: tl.constexpr, KEEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx and, with a scale or a factor, dbranch; this program's part of the gradients of the
    vectors."""
    row = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, P)[None, :]
    live = c < C
    w = tl.load(weight + c, mask=live, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, P), tl.float32)
    dbias = tl.zeros((ROWS, P), tl.float32)
    if SCALE:
        factor = tl.load(scale + c, mask=live, other=0.0).to(tl.float32)
        dscale = tl.zeros((ROWS, P), tl.float32)
    tiles = tl.cdiv(tokens, ROWS)
    # Three tiles of float32 are more than the shared memory of a GPU of compute capability 8.9.
    AHEAD: tl.constexpr = 1 if x.dtype.element_ty == tl.float32 else STAGES
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=AHEAD):
        n = (tile * ROWS + row).to(tl.int64)
        ok = (n < tokens) & live
        at = n * C + c
        source = x + (at if CENTER else n * x_n + c)
        s = tl.load(source, mask=ok, other=0.0).to(tl.float32)
        if KEEP:
            kept = tl.load(keep + n // image, mask=n < tokens, other=0.0).to(tl.float32)
        if SCALE:
            term = tl.load(branch + at, mask=ok, other=0.0).to(tl.float32)
            if KEEP:
                term *= kept
            s = (s + factor * term).to(dx.dtype.element_ty).to(tl.float32)
        dy = tl.load(dnorm + at, mask=ok, other=0.0).to(tl.float32)
        y, inverse = standardize(s, live, eps, C, CENTER)
        dweight += dy * y
        if CENTER:
            dbias += dy
        dy *= w
        ds = dy - y * (tl.sum(dy * y, 1) * (1.0 / C))[:, None]
        if CENTER:
            ds -= (tl.sum(dy, 1) * (1.0 / C))[:, None]
        ds *= inverse
        if TOTAL:
            ds += tl.load(dtotal + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(dx + at, ds.to(dx.dtype.element_ty), mask=ok)
        if SCALE:
            dscale += tl.where(ok, ds * term, 0.0)
            ds *= factor
        if KEEP:
            ds *= kept
        if SCALE or KEEP:
            tl.store(dbranch + at, ds.to(dbranch.dtype.element_ty), mask=ok)
    c = tl.arange(0, P)
    parts += tl.program_id(0).to(tl.int64) * ((1 + CENTER + SCALE) * C) + c
    tl.store(parts, tl.sum(dweight, 0), mask=c < C)
    if CENTER:
        tl.store(parts + C, tl.sum(dbias, 0), mask=c < C)
    if SCALE:
        tl.store(parts + 2 * C, tl.sum(dscale, 0), mask=c < C)


def backward(
    dtotal: Tensor | None,
    dnorm: Tensor,
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    keep: Tensor | None,
    weight: Tensor,
    eps: float,
    dx: Tensor,
    dbranch: Tensor | None,
    center: bool = True,
) -> Tensor:
    """Write the gradient of x to `dx` and, with a scale or a factor, that of the branch to
    `dbranch`.

    Args:
        dtotal, dnorm: the gradients of the sum, or None, and of its norm.
        x: the sum that was normalised; with a scale, what the scaled branch is added to.
        branch, scale: both None, or both tensors.
        keep: the factor of each image, or None.
        weight, eps: of the norm.
        center: whether the norm is a layer norm, of a contiguous `x`; else it is `rms_norm`,
            without a bias, of rows (N, C).

    Returns:
        The gradients of weight, bias and, with a scale, the scale: (1, C), (2, C) or (3, C) in
        float32.
    """
    has_scale = scale is not None
    given = has_scale, has_scale, keep is not None
    how = plan(x.shape, x.device, eps, *given, dtotal is not None, center)
    parts = torch.empty(how.parts, dtype=torch.float32, device=x.device)
    dtotal = dnorm if dtotal is None else dtotal
    branch, scale, keep = (dx if t is None else t.contiguous() for t in (branch, scale, keep))
    dbranch = dx if dbranch is None else dbranch
    launch(
        _backward, how.backward,
        dtotal, dnorm, x, branch, scale, keep, weight.contiguous(), dx, dbranch, parts,
        x.shape[-1] if center else x.stride(0),
    )  # fmt: skip
    return parts.sum(0)
