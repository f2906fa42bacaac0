"""The Triton kernel of `landmark_kernel`."""

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import launch
from .mathematics import landmark_tile, rows_of
from .plan import plan


@triton.jit(do_not_specialize=["marks", "heads"])
def _landmark_kernel(
    x, out, x_b, x_n, x_h, marks, heads, D: tl.constexpr, P: tl.constexpr, BM: tl.constexpr
):
    bh = tl.program_id(0)
    x += (bh // heads).to(tl.int64) * x_b + (bh % heads) * x_h
    first = tl.program_id(1) * BM
    second = tl.program_id(2) * BM
    i = first + tl.arange(0, BM)
    j = second + tl.arange(0, BM)
    x_i = rows_of(x, first, marks, x_n, D, P, BM)
    x_j = rows_of(x, second, marks, x_n, D, P, BM)
    at = (bh.to(tl.int64) * marks + i[:, None]) * marks + j[None, :]
    mask = (i < marks)[:, None] & (j < marks)[None, :]
    tl.store(out + at, landmark_tile(x_i, x_j, i, j), mask=mask)


def forward(landmarks: Tensor, out: Tensor) -> None:
    """Write the landmarks' own kernels to `out`, (B, heads, M, M)."""
    how = plan(landmarks.shape).forward
    launch(_landmark_kernel, how, landmarks, out, *landmarks.stride()[:3])
