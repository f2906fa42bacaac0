"""Square matrices in Triton, padded with zeros."""

import triton
import triton.language as tl

from ..runtime.mathematics import PRECISION


@triton.jit
def multiply(a, b):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load_square(x, size, M: tl.constexpr):
    """A matrix of size x size padded to M x M with zeros, and the padded identity."""
    i = tl.arange(0, M)
    live = i < size
    at = i[:, None] * size + i[None, :]
    mask = live[:, None] & live[None, :]
    eye = tl.where((i[:, None] == i[None, :]) & mask, 1.0, 0.0)
    return tl.load(x + at, mask=mask, other=0.0), eye


@triton.jit
def store_square(x, value, size, M: tl.constexpr):
    i = tl.arange(0, M)
    live = i < size
    at = i[:, None] * size + i[None, :]
    tl.store(x + at, value, mask=live[:, None] & live[None, :])
