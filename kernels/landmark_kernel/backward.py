"""The Triton kernel of the gradient of `landmark_kernel`."""

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from ..runtime.mathematics import PRECISION
from .mathematics import landmark_tile, rows_of
from .plan import plan


@triton.jit(do_not_specialize=["marks", "heads"])
def _landmark_kernel_gradient(
    grad, x, out, x_b, x_n, x_h, o_b, o_n, o_h, marks, heads,
    D: tl.constexpr, P: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """dx_i = sum_j E_ij (x_j - x_i), E = (dK + dK^T) * K, for BM landmarks per program."""
    bh = tl.program_id(0)
    x += (bh // heads).to(tl.int64) * x_b + (bh % heads) * x_h
    out += (bh // heads).to(tl.int64) * o_b + (bh % heads) * o_h
    grad += bh.to(tl.int64) * marks * marks
    first = tl.program_id(1) * BM
    i = first + tl.arange(0, BM)
    x_i = rows_of(x, first, marks, x_n, D, P, BM)
    total = tl.zeros((BM, P), tl.float32)
    mass = tl.zeros((BM,), tl.float32)
    for second in range(0, marks, BM):
        j = second + tl.arange(0, BM)
        x_j = rows_of(x, second, marks, x_n, D, P, BM)
        # The diagonal is constant.
        mask = (i < marks)[:, None] & (j < marks)[None, :] & (i[:, None] != j[None, :])
        at = i[:, None].to(tl.int64) * marks + j[None, :]
        e = tl.load(grad + at, mask=mask, other=0.0)
        at = j[None, :].to(tl.int64) * marks + i[:, None]
        e += tl.load(grad + at, mask=mask, other=0.0)
        e *= landmark_tile(x_i, x_j, i, j)
        total = tl.dot(e, x_j.to(tl.float32), total, input_precision=PRECISION)
        mass += tl.sum(e, 1)
    total -= mass[:, None] * x_i.to(tl.float32)
    d = tl.arange(0, P)[None, :]
    mask = (i < marks)[:, None] & (d < D)
    tl.store(out + i[:, None] * o_n + d, total.to(out.dtype.element_ty), mask=mask)


def backward(grad: Tensor, landmarks: Tensor, out: Tensor) -> None:
    """Write the landmarks' gradient to `out`."""
    how = plan(landmarks.shape).backward
    strides = (*landmarks.stride()[:3], *out.stride()[:3])
    launch(_landmark_kernel_gradient, how, grad, landmarks, out, *strides)
