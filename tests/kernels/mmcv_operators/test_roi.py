import math

import pytest
import torch
from torch.autograd import gradcheck

from linsight.kernels.mmcv_operators import roi

from .plain import differentiable, pixel

# Two images; regions inside, across the border, far outside, of a fraction of a pixel, of none.
ROIS = torch.tensor(
    [
        [0, 2.3, 1.1, 9.2, 8.7],
        [1, -3.0, -2.0, 4.1, 5.2],
        [1, 30.0, 30.0, 40.0, 44.0],
        [0, 4.2, 4.4, 4.6, 4.9],
        [0, 5.0, 5.0, 5.0, 5.0],
    ],
    dtype=torch.float64,
)


def features(channels: int = 3, height: int = 7, width: int = 9) -> torch.Tensor:
    return torch.randn(2, channels, height, width, dtype=torch.float64)


def at(plane, y, x):
    """RoIAlign's bilinear sample: the border's value up to a pixel outside, zero beyond."""
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return torch.zeros((), dtype=plane.dtype)
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    dy, dx = y - top, x - left
    return (1 - dy) * (
        (1 - dx) * pixel(plane, top, left) + dx * pixel(plane, top, left + 1)
    ) + dy * ((1 - dx) * pixel(plane, top + 1, left) + dx * pixel(plane, top + 1, left + 1))


def plain_align(input, rois, size, scale, ratio, aligned, reduce, offset=None, gamma=0.0):
    out = torch.zeros(len(rois), input.shape[1], *size, dtype=input.dtype)
    for k, (image, *corners) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (v * scale - 0.5 * aligned for v in corners)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1), max(height, 1)
        bin_h, bin_w = height / size[0], width / size[1]
        rows, columns = (ratio or math.ceil(side) for side in (bin_h, bin_w))
        for c, i, j in torch.cartesian_prod(*map(torch.arange, out.shape[1:])).tolist():
            dx, dy = offset[k, :, i, j].tolist() if offset is not None else (0, 0)
            points = [
                (
                    y1 + gamma * height * dy + (i + (p + 0.5) / rows) * bin_h,
                    x1 + gamma * width * dx + (j + (q + 0.5) / columns) * bin_w,
                )
                for p in range(rows)
                for q in range(columns)
            ]
            if points:
                values = torch.stack([at(input[int(image), c], *point) for point in points])
                out[k, c, i, j] = reduce(values)
    return out


def align(size, scale, ratio, mode, aligned):
    """mmcv's RoIAlign over the two operators, of the map alone."""
    options = (*size, scale, ratio, mode, aligned)
    rows, columns = (torch.full((len(ROIS), 3, *size), torch.nan) for _ in range(2))

    def run(input):
        out = torch.full((len(ROIS), 3, *size), torch.nan, dtype=input.dtype)
        roi.roi_align_forward(input, ROIS.to(input.dtype), out, rows, columns, *options)
        return out

    def differentiate(slope, input):
        grad = torch.full_like(input, torch.nan)
        roi.roi_align_backward(slope, ROIS.to(input.dtype), rows, columns, grad, *options)
        return grad

    return differentiable(run, differentiate)


@pytest.mark.parametrize("mode", [roi.AVERAGE, roi.MAXIMUM])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align(seed, mode, ratio, aligned):
    input = features()
    out = align((2, 3), 0.9, ratio, mode, aligned)(input)
    reduce = torch.mean if mode == roi.AVERAGE else torch.max
    expected = plain_align(input, ROIS, (2, 3), 0.9, ratio, aligned, reduce)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("mode", [roi.AVERAGE, roi.MAXIMUM])
def test_roi_align_gradient(seed, mode):
    gradcheck(align((2, 3), 0.9, 2, mode, True), features().requires_grad_())


@pytest.mark.parametrize("mode", [roi.AVERAGE, roi.MAXIMUM])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_roi_align_in_16_bits(seed, mode, dtype):
    input = features().to(dtype)
    out = align((2, 2), 1.0, 2, mode, True)(input)
    exact = align((2, 2), 1.0, 2, mode, True)(input.double())
    assert out.dtype == dtype
    # Corners are rounded too: by half a 128th of a coordinate below 64 in bfloat16.
    bound = 0.05 if dtype == torch.float16 else 0.25
    assert (out.double() - exact)[[0, 1, 3]].abs().max() < bound


@pytest.mark.parametrize("mode", [roi.AVERAGE, roi.MAXIMUM])
def test_roi_align_of_no_regions(mode):
    none = torch.zeros(0, 3, 2, 2)
    roi.roi_align_forward(
        torch.ones(1, 3, 4, 4), torch.zeros(0, 5), none, none, none, 2, 2, 1.0, 0, mode, True
    )
    grad = torch.full((1, 3, 4, 4), torch.nan)
    roi.roi_align_backward(none, torch.zeros(0, 5), none, none, grad, 2, 2, 1.0, 0, mode, True)
    assert not grad.any()


def pool(size, scale):
    argmax = torch.full((len(ROIS), 3, *size), -7, dtype=torch.int32)

    def run(input):
        out = torch.full(argmax.shape, torch.nan, dtype=input.dtype)
        roi.roi_pool_forward(input, ROIS.to(input.dtype), out, argmax, *size, scale)
        return out

    def differentiate(slope, input):
        grad = torch.full_like(input, torch.nan)
        roi.roi_pool_backward(slope, ROIS.to(input.dtype), argmax, grad, *size, scale)
        return grad

    return differentiable(run, differentiate)


def test_roi_pool(seed):
    input, scale, size = features(), 0.7, (2, 3)
    expected = torch.zeros(len(ROIS), 3, *size, dtype=torch.float64)
    for k, (image, x1, y1, x2, y2) in enumerate(ROIS.tolist()):
        x1, y1, x2, y2 = x1 * scale, y1 * scale, (x2 + 1) * scale, (y2 + 1) * scale
        for i in range(size[0]):
            for j in range(size[1]):
                rows = [y1 + (y2 - y1) * n / size[0] for n in (i, i + 1)]
                columns = [x1 + (x2 - x1) * n / size[1] for n in (j, j + 1)]
                cut = input[
                    int(image),
                    :,
                    max(math.floor(rows[0]), 0) : max(math.ceil(rows[1]), 0),
                    max(math.floor(columns[0]), 0) : max(math.ceil(columns[1]), 0),
                ]
                if cut.numel():
                    expected[k, :, i, j] = cut.amax((1, 2))
    torch.testing.assert_close(pool(size, scale)(input), expected)


def test_roi_pool_gradient(seed):
    # All values apart, so that no step of the check changes a maximum.
    input = torch.randperm(2 * 3 * 7 * 9).double().view(2, 3, 7, 9)
    gradcheck(pool((2, 3), 0.7), input.requires_grad_())


def deformable(size, scale, ratio, gamma):
    options = (*size, scale, ratio, gamma)

    def run(input, offset):
        out = torch.full((len(ROIS), input.shape[1], *size), torch.nan, dtype=input.dtype)
        roi.deform_roi_pool_forward(input, ROIS, offset, out, *options)
        return out

    def differentiate(slope, input, offset):
        grads = torch.full_like(input, torch.nan), torch.full_like(offset, torch.nan)
        roi.deform_roi_pool_backward(slope, input, ROIS, offset, *grads, *options)
        return grads

    return differentiable(run, differentiate)


@pytest.mark.parametrize("ratio", [0, 2])
def test_deform_roi_pool(seed, ratio):
    input, offset = features(), torch.randn(len(ROIS), 2, 2, 3, dtype=torch.float64)
    out = deformable((2, 3), 0.9, ratio, 0.3)(input, offset)
    expected = plain_align(input, ROIS, (2, 3), 0.9, ratio, True, torch.mean, offset, 0.3)
    torch.testing.assert_close(out, expected)


def test_deform_roi_pool_without_offsets(seed):
    input = features().requires_grad_()
    out = deformable((2, 3), 0.9, 2, 0.3)(input, torch.zeros(0, dtype=torch.float64))
    expected = align((2, 3), 0.9, 2, roi.AVERAGE, True)(input)
    torch.testing.assert_close(out, expected)
    slope = torch.randn_like(out)
    torch.testing.assert_close(*(torch.autograd.grad(y, input, slope)[0] for y in (out, expected)))


def test_deform_roi_pool_gradient(seed):
    offset = torch.randn(len(ROIS), 2, 2, 2, dtype=torch.float64)
    function = deformable((2, 2), 0.9, 2, 0.3)
    gradcheck(function, (features(2, 5, 6).requires_grad_(), offset.requires_grad_()))
