"""Pooling of regions of interest. `rois` are (K, 5): index into the batch, x1, y1, x2, y2."""

from functools import partial, reduce

import torch
import torchvision  # noqa: F401  registers torch.ops.torchvision
from torch import Tensor

from .autograd import accumulator, gradients

MAXIMUM, AVERAGE = range(2)


def _planes(x: Tensor) -> tuple[Tensor, ...]:
    """The columns of `x` (K, n), each (K, 1, 1, 1)."""
    return x[:, :, None, None, None].unbind(1)


class _Samples:
    """Where RoIAlign samples its regions: a grid of points in each of their h x w bins.

    All that is computed of them is laid out as (K, h, w, C).
    """

    def __init__(self, rois: Tensor, pooled: torch.Size, scale: float, ratio: int, half: bool):
        corners = rois[:, 1:] * scale - (0.5 if half else 0.0)
        sides = corners[:, 2:] - corners[:, :2]
        if not half:
            sides = sides.clamp(min=1)
        bins = sides / sides.new_tensor(pooled[::-1])
        counts = torch.full_like(bins, ratio) if ratio > 0 else bins.ceil()
        self.batch = rois[:, 0].long()[:, None, None, None]
        self.left, self.top, *_ = _planes(corners)
        self.width, self.height = _planes(sides)
        self.bin_width, self.bin_height = _planes(bins)
        self.columns, self.rows = _planes(counts.clamp(min=0))
        self.bin_row = torch.arange(pooled[0], device=rois.device)[:, None, None]
        self.bin_column = torch.arange(pooled[1], device=rois.device)[:, None]

    def steps(self) -> list[tuple[int, int]]:
        """The indices (i, j) of a bin's points, in the region that has most."""
        if not len(self.rows):
            return []
        rows, columns = int(self.rows.max()), int(self.columns.max())
        return [(i, j) for i in range(rows) for j in range(columns)]

    def has(self, i: int, j: int) -> Tensor:
        """Whether a region's bins have a point (i, j): (K, 1, 1, 1)."""
        return (i < self.rows) & (j < self.columns)

    def points(self, i: int | Tensor, j: int | Tensor) -> tuple[Tensor, Tensor]:
        """Ordinates (K, h, 1, 1) and abscissae (K, 1, w, 1) of points (i, j); like i and j, if
        those are (K, h, w, C)."""
        row = self.bin_row + (i + 0.5) / self.rows.clamp(min=1)
        column = self.bin_column + (j + 0.5) / self.columns.clamp(min=1)
        return self.top + row * self.bin_height, self.left + column * self.bin_width


def _corners(size: torch.Size, y: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The four pixels around a point in a map of `size`: bilinear weight, row, column.

    Points up to one pixel outside take the border's value, those beyond weigh nothing.
    """
    height, width = size
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    top, left = y.detach().floor().long(), x.detach().floor().long()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    dy, dx = y - top, x - left
    pixels = (
        ((1 - dy) * (1 - dx), top, left),
        ((1 - dy) * dx, top, right),
        (dy * (1 - dx), bottom, left),
        (dy * dx, bottom, right),
    )
    return [(torch.where(inside, weight, 0.0), row, column) for weight, row, column in pixels]


def _interpolate(features: Tensor, batch: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Values (K, h, w, C) of `features` (B, H, W, C) at points that all channels share."""
    return reduce(
        torch.add,
        (
            weight * features[batch[..., 0], row[..., 0], column[..., 0]]
            for weight, row, column in _corners(features.shape[1:3], y, x)
        ),
    )


def _computable(*tensors: Tensor) -> list[Tensor]:
    """The tensors in one dtype that torchvision's kernels take: it has none for bfloat16."""
    dtype = torch.float32 if tensors[0].dtype == torch.bfloat16 else tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype).contiguous() for x in tensors]


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign (He et al., 2017) of `input` (B, C, H, W) into `output` (K, C, h, w).

    Each of h x w bins takes the average (`pool_mode` 1) or the maximum (0) of `sampling_ratio`²
    bilinear samples, or of as many as it has pixels if that is 0. `aligned` shifts regions by
    half a pixel, and lets them be smaller than one. For the maximum, `argmax_y` and `argmax_x`
    get the indices of the sample in its bin, -1 where there is none and `output` is 0.
    """
    if pool_mode == AVERAGE:
        pooled = torch.ops.torchvision.roi_align(
            *_computable(input, rois),
            spatial_scale,
            aligned_height,
            aligned_width,
            sampling_ratio,
            aligned,
        )
        output.copy_(pooled)
        return
    dtype = accumulator(input)
    samples = _Samples(rois.to(dtype), output.shape[2:], spatial_scale, sampling_ratio, aligned)
    features = input.to(dtype).permute(0, 2, 3, 1).contiguous()
    best = torch.full_like(output, -torch.inf, dtype=dtype).permute(0, 2, 3, 1)
    rows, columns = (index.fill_(-1).permute(0, 2, 3, 1) for index in (argmax_y, argmax_x))
    for i, j in samples.steps():
        value = _interpolate(features, samples.batch, *samples.points(i, j))
        better = (value > best) & samples.has(i, j)
        best = torch.where(better, value, best)
        rows.masked_fill_(better, i)
        columns.masked_fill_(better, j)
    output.copy_(best.masked_fill(rows < 0, 0).permute(0, 3, 1, 2))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """The gradient of `roi_align_forward` in its input, into `grad_input` (B, C, H, W)."""
    if pool_mode == AVERAGE:
        gradient = torch.ops.torchvision._roi_align_backward(
            *_computable(grad_output, rois),
            spatial_scale,
            aligned_height,
            aligned_width,
            *grad_input.shape,
            sampling_ratio,
            aligned,
        )
        grad_input.copy_(gradient)
        return
    dtype = accumulator(grad_output)
    samples = _Samples(
        rois.to(dtype), grad_output.shape[2:], spatial_scale, sampling_ratio, aligned
    )
    rows, columns = (index.to(dtype).permute(0, 2, 3, 1) for index in (argmax_y, argmax_x))
    slope = grad_output.to(dtype).permute(0, 2, 3, 1).masked_fill(rows < 0, 0)
    channel = torch.arange(slope.shape[-1], device=slope.device)
    gradient = torch.zeros_like(grad_input, dtype=dtype)
    for weight, row, column in _corners(grad_input.shape[2:], *samples.points(rows, columns)):
        gradient.index_put_((samples.batch, channel, row, column), weight * slope, accumulate=True)
    grad_input.copy_(gradient)


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """RoIPool (Girshick, 2015) of `input` (B, C, H, W) into `output` (K, C, h, w).

    A region reaches from x1 s to (x2 + 1) s, s the `spatial_scale`; a bin takes the maximum of
    the pixels that it touches. `argmax` (int32) gets that pixel's index in H x W, -1 where the
    bin has none and `output` is 0. (torchvision's operator rounds the regions first.)
    """
    height, width = input.shape[2:]
    rois = rois.to(accumulator(rois))
    batch = rois[:, 0].long()[:, None, None, None]
    left, top, right, bottom = _planes(
        (rois[:, 1:] + rois.new_tensor([0, 0, 1, 1])) * spatial_scale
    )
    valid = (right > left) & (bottom > top)

    def edges(start: Tensor, end: Tensor, bins: int, size: int) -> tuple[Tensor, Tensor]:
        index = torch.arange(bins, device=rois.device)
        side = (end - start) / bins
        first, last = (index * side + start).floor(), ((index + 1) * side + start).ceil()
        return first.clamp(0, size).long(), last.clamp(0, size).long()

    top, bottom = (t.mT for t in edges(top, bottom, pooled_height, height))
    left, right = edges(left, right, pooled_width, width)
    channel = torch.arange(input.shape[1], device=input.device)[:, None, None]
    best = torch.full_like(output, -torch.inf)
    argmax.fill_(-1)
    rows, columns = (
        int((b - a).max()) if len(rois) else 0 for a, b in ((top, bottom), (left, right))
    )
    for i in range(rows):
        for j in range(columns):
            y, x = top + i, left + j
            value = input[batch, channel, y.clamp(max=height - 1), x.clamp(max=width - 1)]
            better = (value > best) & (y < bottom) & (x < right) & valid
            best = torch.where(better, value, best)
            argmax.copy_(torch.where(better, y * width + x, argmax))
    output.copy_(best.masked_fill(argmax < 0, 0))


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """The gradient of `roi_pool_forward` in its input, into `grad_input` (B, C, H, W)."""
    channel = torch.arange(argmax.shape[1], device=argmax.device)[:, None, None]
    plane = rois[:, 0].long()[:, None, None, None] * argmax.shape[1] + channel
    slope = grad_output.to(accumulator(grad_output)).masked_fill(argmax < 0, 0)
    gradient = torch.zeros_like(grad_input, dtype=slope.dtype).flatten(0, 1).flatten(1)
    gradient.index_put_((plane, argmax.clamp(min=0).long()), slope, accumulate=True)
    grad_input.copy_(gradient.view_as(grad_input))


def _shifted_sample(
    features: Tensor, offset: Tensor, samples: _Samples, gamma: float, i: int, j: int
) -> Tensor:
    """What sample (i, j) of each bin, moved by its bin's offset, adds to the bin's average.

    `features` are (B, H, W, C), `offset` (K, h, w, 2).
    """
    y, x = samples.points(i, j)
    y = y + gamma * samples.height * offset[..., 1:]
    x = x + gamma * samples.width * offset[..., :1]
    share = samples.has(i, j) / (samples.rows * samples.columns).clamp(min=1)
    return share * _interpolate(features, samples.batch, y, x)


def _channels_last(input: Tensor, rois: Tensor, offset: Tensor, pooled: torch.Size) -> list[Tensor]:
    """The map and the offsets, zeros for none, as `_shifted_sample` takes them."""
    dtype = accumulator(input)
    if not offset.numel():
        offset = torch.zeros(len(rois), 2, *pooled, device=input.device)
    return [x.to(dtype).permute(0, 2, 3, 1).contiguous() for x in (input, offset)]


def deform_roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Deformable RoI pooling (Dai et al., 2017, equation 6), into `output` (K, C, h, w).

    RoIAlign's average with `aligned` regions, each bin moved by `gamma` times the region's width
    and height times `offset` (K, 2, h, w), x first; an empty `offset` moves none.
    """
    pooled = output.shape[2:]
    features, shifts = _channels_last(input, rois, offset, pooled)
    samples = _Samples(rois.to(features.dtype), pooled, spatial_scale, sampling_ratio, True)
    total = torch.zeros_like(output, dtype=features.dtype).permute(0, 2, 3, 1)
    for i, j in samples.steps():
        total += _shifted_sample(features, shifts, samples, gamma, i, j)
    output.copy_(total.permute(0, 3, 1, 2))


def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """The gradients of `deform_roi_pool_forward` in its input and its offset."""
    pooled = grad_output.shape[2:]
    leaves = _channels_last(input, rois, offset, pooled)
    samples = _Samples(rois.to(leaves[0].dtype), pooled, spatial_scale, sampling_ratio, True)
    slope = grad_output.permute(0, 2, 3, 1)
    totals = [torch.zeros_like(x) for x in leaves]
    # Sample by sample, so that one sample's temporaries are all that is held.
    for i, j in samples.steps():
        sample = partial(_shifted_sample, samples=samples, gamma=gamma, i=i, j=j)
        for total, part in zip(totals, gradients(sample, leaves, slope), strict=True):
            total += part
    grad_input.copy_(totals[0].permute(0, 3, 1, 2))
    if offset.numel():
        grad_offset.copy_(totals[1].permute(0, 3, 1, 2))
