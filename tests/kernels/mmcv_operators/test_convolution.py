import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from linsight.kernels.mmcv_operators import convolution

from .plain import bilinear, differentiable

GROUPS, MOVING = 2, 2  # of the convolution, and of channels that move together
STRIDE, PADDING, DILATION = (2, 1), (1, 2), (1, 2)
GEOMETRY = (*STRIDE, *PADDING, *DILATION, GROUPS, MOVING)
KERNEL = (3, 2)


def problem(batch: int = 2, channels: int = 4, size: tuple[int, int] = (6, 5), out: int = 6):
    """Input, weight, offset, mask and bias."""
    height, width = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(size, PADDING, DILATION, KERNEL, STRIDE, strict=True)
    )
    points = KERNEL[0] * KERNEL[1]
    shapes = (
        (batch, channels, *size),
        (out, channels // GROUPS, *KERNEL),
        (batch, MOVING * points * 2, height, width),
        (batch, MOVING * points, height, width),
        (out,),
    )
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def modulated(input, weight, offset, mask, bias):
    """mmcv's modulated deformable convolution over its two operators."""

    def run(input, weight, offset, mask, bias):
        out = torch.full((len(input), len(weight), *offset.shape[2:]), torch.nan).to(input)
        scratch = input.new_empty(0)
        convolution.modulated_deform_conv_forward(
            input, weight, bias, scratch, offset, mask, out, scratch, *KERNEL, *GEOMETRY, True
        )
        return out

    def differentiate(slope, input, weight, offset, mask, bias):
        tensors = (input, weight, offset, mask, bias)
        grads = [torch.full_like(x, torch.nan) for x in tensors]
        scratch = input.new_empty(0)
        grad_input, grad_weight, grad_offset, grad_mask, grad_bias = grads
        convolution.modulated_deform_conv_backward(
            input,
            weight,
            bias,
            scratch,
            offset,
            mask,
            scratch,
            grad_input,
            grad_weight,
            grad_bias,
            grad_offset,
            grad_mask,
            slope,
            *KERNEL,
            *GEOMETRY,
            True,
        )
        return tuple(grads)

    return differentiable(run, differentiate)(input, weight, offset, mask, bias)


def plain(input, weight, offset, mask, bias):
    out = bias[:, None, None].expand(len(input), -1, *offset.shape[2:]).clone()
    per_group = len(weight) // GROUPS
    together = input.shape[1] // MOVING
    for b, o, y, x in torch.cartesian_prod(*map(torch.arange, out.shape)).tolist():
        for c in range(weight.shape[1]):
            channel = o // per_group * weight.shape[1] + c
            for i in range(KERNEL[0]):
                for j in range(KERNEL[1]):
                    point = (channel // together * KERNEL[0] + i) * KERNEL[1] + j
                    dy, dx = offset[b, 2 * point : 2 * point + 2, y, x].tolist()
                    row = y * STRIDE[0] - PADDING[0] + i * DILATION[0] + dy
                    column = x * STRIDE[1] - PADDING[1] + j * DILATION[1] + dx
                    value = bilinear(input[b, channel], row, column)
                    out[b, o, y, x] += weight[o, c, i, j] * mask[b, point, y, x] * value
    return out


def test_modulated_deformable_convolution(seed):
    tensors = problem()
    torch.testing.assert_close(modulated(*tensors), plain(*tensors))


def test_gradient_of_modulated_deformable_convolution(seed):
    tensors = problem(batch=1, size=(4, 3), out=2)
    gradcheck(modulated, [x.requires_grad_() for x in tensors])


def version_1(input, weight, offset):
    stride, padding, dilation = (GEOMETRY[i : i + 2][::-1] for i in (0, 2, 4))
    options = (*KERNEL[::-1], *stride, *padding, *dilation, GROUPS, MOVING)

    def run(input, weight, offset):
        out = torch.full((len(input), len(weight), *offset.shape[2:]), torch.nan).to(input)
        scratch = input.new_empty(0)
        convolution.deform_conv_forward(
            input, weight, offset, out, scratch, scratch, *options, im2col_step=1
        )
        return out

    def differentiate(slope, input, weight, offset):
        grads = [torch.full_like(x, torch.nan) for x in (input, weight, offset)]
        scratch = input.new_empty(0)
        convolution.deform_conv_backward_input(
            input, offset, slope, grads[0], grads[2], weight, scratch, *options, im2col_step=1
        )
        convolution.deform_conv_backward_parameters(
            input, offset, slope, grads[1], scratch, scratch, *options, scale=1, im2col_step=1
        )
        return tuple(grads)

    return differentiable(run, differentiate)(input, weight, offset)


def test_deformable_convolution(seed):
    input, weight, offset, mask, bias = problem()
    expected = plain(input, weight, offset, torch.ones_like(mask), torch.zeros_like(bias))
    torch.testing.assert_close(version_1(input, weight, offset), expected)


def test_gradient_of_deformable_convolution(seed):
    gradcheck(version_1, [x.requires_grad_() for x in problem(batch=1, size=(4, 3), out=2)[:3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_offsets_are_a_convolution(seed, dtype):
    input, weight, offset, mask, bias = (x.to(dtype) for x in problem())
    out = modulated(input, weight, torch.zeros_like(offset), torch.ones_like(mask), bias)
    expected = F.conv2d(input, weight, bias, STRIDE, PADDING, DILATION, GROUPS)
    torch.testing.assert_close(out, expected)


def test_points_just_outside_do_not_pull(seed):
    """In row -1, where a zero offset puts the padding, the sample has a kink: no gradient."""
    input, weight, offset, mask, bias = problem()
    offset = torch.zeros_like(offset).requires_grad_()
    (grad,) = torch.autograd.grad(modulated(input, weight, offset, mask, bias).sum(), offset)
    shape = (len(input), MOVING, *KERNEL, 2, *offset.shape[2:])
    assert not grad.view(shape)[:, :, 0, :, :, 0].any()  # the first output's upper points
    assert grad.view(shape)[:, :, 2, 1].any()


def test_masked_convolution(seed):
    input = torch.randn(1, 3, 5, 6, dtype=torch.float64)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    rows, columns = (torch.rand(5, 6) < 0.4).nonzero().unbind(1)
    col = torch.full((3 * 9, len(rows)), torch.nan, dtype=torch.float64)
    convolution.masked_im2col_forward(
        input, rows, columns, col, kernel_h=3, kernel_w=3, pad_h=1, pad_w=1
    )
    out = torch.zeros(1, 4, 5, 6, dtype=torch.float64)
    convolution.masked_col2im_forward(
        weight.flatten(1) @ col, rows, columns, out, height=5, width=6, channels=4
    )
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[rows, columns] = True
    torch.testing.assert_close(out, F.conv2d(input, weight, padding=1) * mask)
