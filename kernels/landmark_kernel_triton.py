"""The Triton kernels of `landmark_kernel`, and what those of `gaussian_attention` share with it."""

import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import launch
from .triton_math import PRECISION, exponential, multiply

MOST_LANDMARKS = 32  # a program's tile


@triton.jit
def half_square(x):
    """|x|^2 / 2 of each row."""
    x = x.to(tl.float32)
    return 0.5 * tl.sum(x * x, 1)


@triton.jit
def rows_of(x, start, last, stride, D: tl.constexpr, P: tl.constexpr, COUNT: tl.constexpr):
    """Rows start .. start + COUNT - 1 of x, zero from `last` on and beyond column D."""
    n = start + tl.arange(0, COUNT)
    d = tl.arange(0, P)
    mask = (n < last)[:, None] & (d < D)[None, :]
    return tl.load(x + n.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def _landmark_tile(x_i, x_j, i, j):
    """One tile of the landmarks' own kernel."""
    if x_i.dtype == tl.float32:
        score = tl.dot(x_i, tl.trans(x_j), input_precision=PRECISION)
    else:
        score = multiply(x_i, tl.trans(x_j))
    score -= half_square(x_i)[:, None] + half_square(x_j)[None, :]
    # Of a landmark with itself a distance is zero but for rounding.
    return tl.where(i[:, None] == j[None, :], 1.0, exponential(score, True))


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
    tl.store(out + at, _landmark_tile(x_i, x_j, i, j), mask=mask)


@triton.jit(do_not_specialize=["marks", "heads"])
def _landmark_kernel_gradient(
    grad, x, out, x_b, x_n, x_h, o_b, o_n, o_h, marks, heads,
    D: tl.constexpr, P: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """dx_i = sum_j E_ij (x_j - x_i), E = (dK + dK^T) * K, of BM landmarks a program."""
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
        e *= _landmark_tile(x_i, x_j, i, j)
        total = tl.dot(e, x_j.to(tl.float32), total, input_precision=PRECISION)
        mass += tl.sum(e, 1)
    total -= mass[:, None] * x_i.to(tl.float32)
    d = tl.arange(0, P)[None, :]
    mask = (i < marks)[:, None] & (d < D)
    tl.store(out + i[:, None] * o_n + d, total.to(out.dtype.element_ty), mask=mask)


def padded_size(size: int) -> int:
    """The power of two, at least 16, that a tile holds `size` rows or columns in."""
    return max(16, 1 << (size - 1).bit_length())


def _landmark_sizes(landmarks: Tensor) -> tuple[int, int, dict]:
    """Programs along (B heads) and along the landmarks, and the options of the two kernels."""
    batch, marks, heads, width = landmarks.shape
    block = max(16, min(MOST_LANDMARKS, padded_size(marks)))
    padded = padded_size(width)
    options = {"D": width, "P": padded, "BM": block, "num_warps": 4, "num_stages": 1}
    return batch * heads, -(-marks // block), options


def forward(landmarks: Tensor, out: Tensor) -> None:
    """Write the landmarks' own kernels to `out`, (B, heads, M, M)."""
    rows, blocks, options = _landmark_sizes(landmarks)
    launch(
        _landmark_kernel, (rows, blocks, blocks),
        landmarks, out, *landmarks.stride()[:3], *landmarks.shape[1:3], **options,
    )  # fmt: skip


def backward(grad: Tensor, landmarks: Tensor, out: Tensor) -> None:
    """Write the landmarks' gradient to `out`."""
    rows, blocks, options = _landmark_sizes(landmarks)
    launch(
        _landmark_kernel_gradient, (rows, blocks),
        grad, landmarks, out, *landmarks.stride()[:3], *out.stride()[:3],
        *landmarks.shape[1:3], **options,
    )  # fmt: skip
