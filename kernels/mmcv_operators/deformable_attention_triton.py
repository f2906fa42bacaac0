"""The Triton kernels of multi-scale deformable attention: 16 queries of one head a program.

The gradient of the values is a scatter: many samples add to one pixel, in an order that changes
from run to run. It is summed in integers of 64 bits, whose sum no order changes, so that two
runs agree bit for bit. Their unit is 2^-62 of a bound on any sum (the largest slope, times the
largest weight, times the samples that a pixel can get, each rounded up to a power of two), finer
than float32 would round.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import Launch, cache_plan, cdiv, launch

QUERIES = 16


@triton.jit
def _place(queries, heads, N: tl.constexpr):
    """A program's batch item (int64), head, and queries: neighbours share the item's values."""
    program = tl.program_id(0)
    blocks = (queries + N - 1) // N
    head, program = program % heads, program // heads
    return (program // blocks).to(tl.int64), head, program % blocks * N + tl.arange(0, N)


@triton.jit
def _point(locations, at, use, height, width):
    """Upper left pixel of a sample, its distances from it, and whether it is near the map."""
    x = tl.load(locations + 2 * at, mask=use, other=-2.0).to(tl.float32) * width - 0.5
    y = tl.load(locations + 2 * at + 1, mask=use, other=-2.0).to(tl.float32) * height - 0.5
    near = (y > -1) & (y < height) & (x > -1) & (x < width)
    y, x = tl.where(near, y, 0.0), tl.where(near, x, 0.0)
    top, left = tl.floor(y), tl.floor(x)
    return top.to(tl.int32), left.to(tl.int32), y - top, x - left, near


@triton.jit
def _corners(top, left, height, width, stride, near, live):
    """Of the four pixels around samples, row by row: offsets (N, 1), and masks (N, P2)."""
    above, below = near & (top >= 0), near & (top + 1 < height)
    first, second = left >= 0, left + 1 < width
    at = (top * width + left).to(tl.int64)[:, None] * stride
    down = width.to(tl.int64) * stride
    return (
        at, at + stride, at + down, at + down + stride,
        (above & first)[:, None] & live, (above & second)[:, None] & live,
        (below & first)[:, None] & live, (below & second)[:, None] & live,
    )  # fmt: skip


@triton.jit(do_not_specialize=["queries", "total"])
def _attend(
    value, shapes, starts, locations, weights, out, queries, total, heads,
    D: tl.constexpr, P2: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    batch, head, query = _place(queries, heads, N)
    live_query = query < queries
    d = tl.arange(0, P2)[None, :]
    live = d < D
    row = (batch * queries + query) * heads + head
    acc = tl.zeros((N, P2), tl.float32)
    for level in range(LEVELS):
        height = tl.load(shapes + 2 * level).to(tl.int32)
        width = tl.load(shapes + 2 * level + 1).to(tl.int32)
        base = value + ((batch * total + tl.load(starts + level)) * heads + head) * D + d
        # Unrolled, so that the loads of all points of a level are under way at once.
        for point in tl.static_range(POINTS):
            at = (row * LEVELS + level) * POINTS + point
            weight = tl.load(weights + at, mask=live_query, other=0.0).to(tl.float32)
            top, left, dy, dx, near = _point(locations, at, live_query, height, width)
            at00, at01, at10, at11, on00, on01, on10, on11 = _corners(
                top, left, height, width, heads * D, near, live
            )
            v00 = tl.load(base + at00, mask=on00, other=0.0).to(tl.float32)
            v01 = tl.load(base + at01, mask=on01, other=0.0).to(tl.float32)
            v10 = tl.load(base + at10, mask=on10, other=0.0).to(tl.float32)
            v11 = tl.load(base + at11, mask=on11, other=0.0).to(tl.float32)
            high, low = weight * (1 - dy), weight * dy
            acc += (high * (1 - dx))[:, None] * v00 + (high * dx)[:, None] * v01
            acc += (low * (1 - dx))[:, None] * v10 + (low * dx)[:, None] * v11
    at = out + row[:, None] * D + d
    tl.store(at, acc.to(out.dtype.element_ty), mask=live_query[:, None] & live)


@triton.jit
def _exponent(x):
    """The e of float32 x < 2^e, as small as can be; 129 of what is not finite."""
    return ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 126


@triton.jit
def _power(e):
    """2^e in float32, e from -126 to 127."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _digits(largest, samples):
    """How many binary digits of the integers lie behind the point. `largest` has the largest
    slope and weight, and 2^samples bounds the samples that a pixel can get."""
    e = _exponent(tl.load(largest)) + _exponent(tl.load(largest + 1)) + samples
    return tl.minimum(tl.maximum(62 - e, -126), 126)


@triton.jit(do_not_specialize=["queries", "total", "samples"])
def _differentiate(
    grad, value, shapes, starts, locations, weights, largest, sums, dlocations, dweights,
    queries, total, heads, samples,
    D: tl.constexpr, P2: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    batch, head, query = _place(queries, heads, N)
    live_query = query < queries
    d = tl.arange(0, P2)[None, :]
    live = d < D
    row = (batch * queries + query) * heads + head
    slope = tl.load(grad + row[:, None] * D + d, mask=live_query[:, None] & live, other=0.0)
    slope = slope.to(tl.float32)
    scale = _power(_digits(largest, samples))
    for level in range(LEVELS):
        height = tl.load(shapes + 2 * level).to(tl.int32)
        width = tl.load(shapes + 2 * level + 1).to(tl.int32)
        plane = ((batch * total + tl.load(starts + level)) * heads + head) * D + d
        base, into = value + plane, sums + plane
        for point in range(POINTS):
            at = (row * LEVELS + level) * POINTS + point
            weight = tl.load(weights + at, mask=live_query, other=0.0).to(tl.float32)
            top, left, dy, dx, near = _point(locations, at, live_query, height, width)
            at00, at01, at10, at11, on00, on01, on10, on11 = _corners(
                top, left, height, width, heads * D, near, live
            )
            # All loads before the first addition, which they would have to wait for.
            v00 = tl.load(base + at00, mask=on00, other=0.0).to(tl.float32)
            v01 = tl.load(base + at01, mask=on01, other=0.0).to(tl.float32)
            v10 = tl.load(base + at10, mask=on10, other=0.0).to(tl.float32)
            v11 = tl.load(base + at11, mask=on11, other=0.0).to(tl.float32)
            m00, m01 = tl.sum(slope * v00, 1), tl.sum(slope * v01, 1)
            m10, m11 = tl.sum(slope * v10, 1), tl.sum(slope * v11, 1)
            sample = (1 - dy) * ((1 - dx) * m00 + dx * m01) + dy * ((1 - dx) * m10 + dx * m11)
            down = (1 - dx) * (m10 - m00) + dx * (m11 - m01)
            right = (1 - dy) * (m01 - m00) + dy * (m11 - m10)
            tl.store(dweights + at, sample.to(dweights.dtype.element_ty), mask=live_query)
            dtype = dlocations.dtype.element_ty
            tl.store(dlocations + 2 * at, (weight * width * right).to(dtype), mask=live_query)
            tl.store(dlocations + 2 * at + 1, (weight * height * down).to(dtype), mask=live_query)
            high, low = weight * (1 - dy) * scale, weight * dy * scale
            share = ((high * (1 - dx))[:, None] * slope).to(tl.int64)
            tl.atomic_add(into + at00, share, mask=on00, sem="relaxed")
            share = ((high * dx)[:, None] * slope).to(tl.int64)
            tl.atomic_add(into + at01, share, mask=on01, sem="relaxed")
            share = ((low * (1 - dx))[:, None] * slope).to(tl.int64)
            tl.atomic_add(into + at10, share, mask=on10, sem="relaxed")
            share = ((low * dx)[:, None] * slope).to(tl.int64)
            tl.atomic_add(into + at11, share, mask=on11, sem="relaxed")


# Specialised on whether 16 divides the total, without which loads are of one element each.
@triton.jit(do_not_specialize=["samples"])
def _round(sums, largest, out, total, samples, BLOCK: tl.constexpr):
    """The integers as numbers; none is one where a slope or a weight was not finite."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    finite = (_exponent(tl.load(largest)) < 129) & (_exponent(tl.load(largest + 1)) < 129)
    unit = tl.where(finite, _power(-_digits(largest, samples)), float("nan"))
    result = tl.load(sums + at, mask=at < total, other=0).to(tl.float32) * unit
    tl.store(out + at, result.to(out.dtype.element_ty), mask=at < total)


@dataclass(frozen=True)
class Plan:
    """The launches of the attention, of its gradients, and of the rounding of the values' sums."""

    attend: Launch
    differentiate: Launch
    round: Launch


@cache_plan
def plan(value: torch.Size, locations: torch.Size, itemsize: int) -> Plan:
    """Plan for values and locations of one shape, and values of `itemsize` bytes."""
    batch, queries, heads, levels, points, _ = locations
    width, block, total = value[-1], 1024, value.numel()
    padded = triton.next_power_of_2(width)
    samples = (queries * points).bit_length()
    sizes = (queries, value[1], heads)

    def make(itemsize: int, *more: int) -> Launch:
        # 16 bytes of each row per thread.
        warps = QUERIES * padded * itemsize // (16 * 32)
        constants = {
            "D": width, "P2": padded, "LEVELS": levels, "POINTS": points, "N": QUERIES,
            "num_warps": min(max(warps, 1), 8),
        }  # fmt: skip
        grid = (cdiv(queries, QUERIES) * heads * batch,)
        return Launch(grid, (*sizes, *more), constants)

    return Plan(
        attend=make(itemsize),
        differentiate=make(4, samples),  # its slopes are float32
        round=Launch((cdiv(total, block),), (total, samples), {"BLOCK": block, "num_warps": 4}),
    )


def forward(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor, out: Tensor
) -> None:
    """Attend with contiguous tensors as of `ms_deform_attn_forward`, into `out` (B, Q, M D)."""
    if out.numel():
        how = plan(value.shape, locations.shape, value.element_size())
        launch(_attend, how.attend, value, shapes, starts, locations, weights, out)


def backward(
    grad: Tensor,
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    locations: Tensor,
    weights: Tensor,
    dvalue: Tensor,
    dlocations: Tensor,
    dweights: Tensor,
) -> None:
    """Write the gradients of contiguous tensors to contiguous tensors like them."""
    if not grad.numel():
        dvalue.zero_()
        return
    largest = torch.stack(
        [torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32) for x in (grad, weights)]
    )
    sums = torch.zeros(value.shape, dtype=torch.int64, device=value.device)
    how = plan(value.shape, locations.shape, value.element_size())
    launch(
        _differentiate, how.differentiate,
        grad, value, shapes, starts, locations, weights, largest, sums, dlocations, dweights,
    )  # fmt: skip
    launch(_round, how.round, sums, largest, dvalue)
