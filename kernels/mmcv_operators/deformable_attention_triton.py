"""The Triton kernels of multi-scale deformable attention: 16 queries of one head a program.

The gradient of the values is a scatter: many samples add to one pixel, in an order that changes
from run to run. It is summed in integers of 64 bits, whose sum no order changes, so that two
runs agree bit for bit. Their unit is 2^-62 of a bound on any sum (the largest slope, times the
largest weight, times the samples that a pixel can get), finer than float32 would round.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import launch

QUERIES = 16


@triton.jit
def _corner(value, row, column, height, width, stride, use, live):
    """Addresses (N, D) of pixels (row, column) and whether they are there."""
    there = use & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    at = value + (row * width + column).to(tl.int64)[:, None] * stride
    return at, there[:, None] & live


@triton.jit
def _point(locations, at, use, height, width):
    """Upper left pixel of a sample, its distances from it, and whether it is near the map."""
    x = tl.load(locations + 2 * at, mask=use, other=-2.0).to(tl.float32) * width - 0.5
    y = tl.load(locations + 2 * at + 1, mask=use, other=-2.0).to(tl.float32) * height - 0.5
    near = (y > -1) & (y < height) & (x > -1) & (x < width)
    y, x = tl.where(near, y, 0.0), tl.where(near, x, 0.0)
    top, left = tl.floor(y), tl.floor(x)
    return top.to(tl.int32), left.to(tl.int32), y - top, x - left, near


@triton.jit(do_not_specialize=["queries", "total"])
def _attend(
    value, shapes, starts, locations, weights, out, queries, total, heads,
    D: tl.constexpr, P2: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(0) % heads, tl.program_id(2).to(tl.int64)
    query = tl.program_id(0) // heads * N + tl.arange(0, N)
    live_query = query < queries
    d = tl.arange(0, P2)[None, :]
    live = d < D
    row = (batch * queries + query) * heads + head
    stride = heads * D
    acc = tl.zeros((N, P2), tl.float32)
    for i in range(LEVELS * POINTS):
        level = i // POINTS
        height = tl.load(shapes + 2 * level).to(tl.int32)
        width = tl.load(shapes + 2 * level + 1).to(tl.int32)
        base = value + ((batch * total + tl.load(starts + level)) * heads + head) * D + d
        at = row * (LEVELS * POINTS) + i
        weight = tl.load(weights + at, mask=live_query, other=0.0).to(tl.float32)
        top, left, dy, dx, near = _point(locations, at, live_query, height, width)
        for corner in tl.static_range(4):
            y, x = top + corner // 2, left + corner % 2
            part = (dy if corner // 2 else 1 - dy) * (dx if corner % 2 else 1 - dx)
            pixel, there = _corner(base, y, x, height, width, stride, near, live)
            acc += (weight * part)[:, None] * tl.load(pixel, mask=there, other=0.0).to(tl.float32)
    at = out + row[:, None] * D + d
    tl.store(at, acc.to(out.dtype.element_ty), mask=live_query[:, None] & live)


@triton.jit(do_not_specialize=["queries", "total"])
def _differentiate(
    grad, value, shapes, starts, locations, weights, scale, sums, dlocations, dweights,
    queries, total, heads,
    D: tl.constexpr, P2: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(0) % heads, tl.program_id(2).to(tl.int64)
    query = tl.program_id(0) // heads * N + tl.arange(0, N)
    live_query = query < queries
    d = tl.arange(0, P2)[None, :]
    live = d < D
    row = (batch * queries + query) * heads + head
    stride = heads * D
    slope = tl.load(grad + row[:, None] * D + d, mask=live_query[:, None] & live, other=0.0)
    slope = slope.to(tl.float32)
    scale = tl.load(scale)
    for i in range(LEVELS * POINTS):
        level = i // POINTS
        height = tl.load(shapes + 2 * level).to(tl.int32)
        width = tl.load(shapes + 2 * level + 1).to(tl.int32)
        plane = ((batch * total + tl.load(starts + level)) * heads + head) * D + d
        at = row * (LEVELS * POINTS) + i
        weight = tl.load(weights + at, mask=live_query, other=0.0).to(tl.float32)
        top, left, dy, dx, near = _point(locations, at, live_query, height, width)
        sample = tl.zeros((N,), tl.float32)
        down = tl.zeros((N,), tl.float32)
        right = tl.zeros((N,), tl.float32)
        for corner in tl.static_range(4):
            y, x = top + corner // 2, left + corner % 2
            part_y = dy if corner // 2 else 1 - dy
            part_x = dx if corner % 2 else 1 - dx
            pixel, there = _corner(value + plane, y, x, height, width, stride, near, live)
            met = tl.sum(slope * tl.load(pixel, mask=there, other=0.0).to(tl.float32), 1)
            sample += part_y * part_x * met
            down += (part_x if corner // 2 else -part_x) * met
            right += (part_y if corner % 2 else -part_y) * met
            pixel, there = _corner(sums + plane, y, x, height, width, stride, near, live)
            share = (weight * part_y * part_x * scale)[:, None] * slope
            tl.atomic_add(pixel, share.to(tl.int64), mask=there, sem="relaxed")
        tl.store(dweights + at, sample.to(dweights.dtype.element_ty), mask=live_query)
        dtype = dlocations.dtype.element_ty
        tl.store(dlocations + 2 * at, (weight * width * right).to(dtype), mask=live_query)
        tl.store(dlocations + 2 * at + 1, (weight * height * down).to(dtype), mask=live_query)


def _launch(value: Tensor, locations: Tensor) -> tuple[tuple[int, int, int], dict]:
    batch, queries, heads, levels, points, _ = locations.shape
    width = value.shape[-1]
    grid = (triton.cdiv(queries, QUERIES) * heads, 1, batch)
    options = {"D": width, "P2": triton.next_power_of_2(width), "LEVELS": levels}
    return grid, options | {"POINTS": points, "N": QUERIES, "num_warps": 4}


def forward(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor, out: Tensor
) -> None:
    """Contiguous tensors as `ms_deform_attn_forward` takes them, into `out` (B, Q, M D)."""
    queries, heads = locations.shape[1:3]
    if out.numel():
        grid, options = _launch(value, locations)
        launch(
            _attend, grid,
            value, shapes, starts, locations, weights, out, queries, value.shape[1], heads,
            **options,
        )  # fmt: skip


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
    """The gradients of contiguous tensors, into contiguous tensors like them."""
    queries, heads = locations.shape[1:3]
    if not grad.numel():
        dvalue.zero_()
        return
    largest = [torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32) for x in (grad, weights)]
    bound = largest[0].double() * largest[1]
    _, exponent = torch.frexp(bound * (queries * locations.shape[4]))
    # A power of two that a float32 can hold. Where slopes overflowed, so must the result.
    exponent = (62 - exponent).clamp(-126, 126)
    scale = torch.ldexp(torch.ones_like(largest[0]), exponent)
    unit = torch.where(bound.isfinite(), 1 / scale, torch.nan)
    sums = torch.zeros(value.shape, dtype=torch.int64, device=value.device)
    grid, options = _launch(value, locations)
    launch(
        _differentiate, grid,
        grad, value, shapes, starts, locations, weights, scale, sums, dlocations, dweights,
        queries, value.shape[1], heads, **options,
    )  # fmt: skip
    torch.mul(sums, unit, out=dvalue)
